"""What one rank sends in a step, by process group, and what Newton-Schulz costs it.

Ring collectives: an all-gather or reduce-scatter of V bytes over p ranks sends V (p-1)/p from each, an all-reduce twice
that. Tensor parallelism follows Korthikanti et al. (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hyperp.config import Config, micro_batches
from megatron_hyperp.optim.ownership import Piece
from megatron_hyperp.optim.tensor_parallel import Cost, Job, costs, machine, taken
from megatron_hyperp.parameters import DISTINCT, is_rounded
from megatron_hyperp.planning.memory import Holding

GRADIENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends to other ranks of a group in one step.

    Attributes:
        tensor: activations between the ranks that share a layer.
        expert: tokens on their way to experts and back.
        pipeline: activations and their gradients between stages.
        data: gradients to their owners and weights back.
        newton_schulz: matrices or Gram matrices between the ranks that share them.
    """

    tensor: float
    expert: float
    pipeline: float
    data: float
    newton_schulz: float


@dataclass(frozen=True, slots=True)
class NewtonSchulzCost:
    """What orthogonalization needs on the busiest rank of a step.

    Attributes:
        flops: on one rank.
        seconds: predicted by the cost model, communication included.
        share: FLOPs over those of the rank's share of forward and backward pass.
    """

    flops: float
    seconds: float
    share: float


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def traffic(config: Config, world_size: int, held: Sequence[Holding]) -> Traffic:
    """Return what a rank of a middle pipeline stage sends in a step.

    Args:
        config: resolved for ``world_size``.
        world_size: ranks of the job.
        held: what the rank holds.
    """
    model, moe, parallel, training = config.model, config.moe, config.parallel, config.training
    tp, pp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    itemsize = 2 if training.bf16 else 4
    count, layers = micro_batches(config, world_size), model.num_layers // pp
    tokens = training.micro_batch_size * model.seq_length
    hidden = float(tokens * model.hidden_size * itemsize)
    # An all-reduce, or a reduce-scatter and an all-gather, around attention and around the MLP, forward and backward;
    # with sequence parallelism inputs are gathered once more for the gradients of weights.
    gathers = (10 if parallel.sequence_parallel else 8) // (2 if moe.num_experts else 1)
    recomputed = 1.5 if training.recompute_granularity == "full" else 1.0
    tensor = gathers * hidden * _others(tp) * layers * recomputed
    if moe.moe_shared_expert_intermediate_size:
        tensor *= 2
    expert = 0.0
    if moe.num_experts:
        # There and back, forward and backward; tensor-parallel ranks dispatch a part of the tokens each.
        expert = 4 * moe.moe_router_topk * hidden / tp * _others(ep) * layers * recomputed
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    pipeline = 2 * virtual * hidden / (tp if parallel.sequence_parallel else 1) if pp > 1 else 0.0
    data = sum(
        item.slots * (GRADIENT_BYTES + itemsize - (itemsize - 1) * _share_in_fp8(config, item)) * _others(item.data)
        for item in held
    )
    sent = sum(cost.sent for cost in _newton_schulz(config, held))
    return Traffic(count * tensor, count * expert, count * pipeline, data, sent)


def _share_in_fp8(config: Config, item: Holding) -> float:
    """Return the share of what is held that is gathered in FP8, as an average over stages."""
    training, layers = config.training, config.model.num_layers
    if not training.fp8_param_gather:
        return 0.0
    sizes = {
        entry.parameter: is_rounded(entry.name, entry.parameter) * entry.parameter.numel() for entry in item.routes
    }
    kept = training.num_layers_at_start_in_bf16 + training.num_layers_at_end_in_bf16
    return sum(sizes.values()) / sum(parameter.numel() for parameter in sizes) * (1 - kept / layers)


def newton_schulz_cost(
    config: Config, world_size: int, held: Sequence[Holding], flops_per_step: float
) -> NewtonSchulzCost:
    """Return what orthogonalization needs on the busiest rank; ``flops_per_step`` are the model's, over all ranks."""
    flops = sum(cost.flops for cost in _newton_schulz(config, held))
    # Experts are dealt out on top of the other matrices' work.
    seconds = max(held[-1].plan.loads)
    return NewtonSchulzCost(flops, seconds, flops * world_size / flops_per_step)


def _newton_schulz(config: Config, held: Sequence[Holding]) -> list[Cost]:
    """Return what each family costs the rank that owns most."""
    result = []
    for item in held:
        busiest = max(range(item.data), key=lambda rank: (item.plan.loads[rank], -rank))
        result += family_costs(config, item, busiest)
    return result


def family_costs(config: Config, item: Holding, rank: int) -> list[Cost]:
    """Return what Newton-Schulz of each family costs a rank that shares in it.

    Args:
        config: resolved.
        item: what the rank holds.
        rank: within the data-parallel group.
    """
    rates = machine()
    families: dict[tuple[object, ...], list[Piece]] = {}
    for piece in item.orthogonalized[rank]:
        entry = item.routes[piece.route]
        key = (entry.rule, entry.role, entry.lr_mult, entry.decays, entry.shape, entry.partition_dim, piece.team_dim)
        families.setdefault(key, []).append(piece)
    result = []
    for pieces in families.values():
        job, newton_schulz = _job(item, pieces), item.routes[pieces[0].route].rule.newton_schulz
        assert newton_schulz is not None
        result.append(costs(job, newton_schulz)[taken(job, newton_schulz, rates, config.optimizer.ns_strategy)])
    return result


def _job(item: Holding, pieces: Sequence[Piece]) -> Job:
    """What the ranks that share a family do together."""
    entry, team_dim = item.routes[pieces[0].route], pieces[0].team_dim
    dim, team = (entry.partition_dim, 1) if team_dim is None else (team_dim, item.plan.team)
    return Job(len(pieces), entry.shape[0], entry.shape[1], dim, 1 if dim == DISTINCT else item.tensor * team)
