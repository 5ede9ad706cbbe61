"""HyperP for any Megatron-Core model: :func:`hyperp_optimizer` (docs/api.md)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.building import build_optimizer
from megatron_hyperp.optim.data_parallel import Exchange, wrap_for_data_parallelism
from megatron_hyperp.optim.distributed import HyperPOptimizer
from megatron_hyperp.optim.groups import Groups
from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.routing import Heads
from megatron_hyperp.parameters import mark_expert_parameters, named_parameters


def hyperp_optimizer(
    model_chunks: Sequence[torch.nn.Module],
    config: HyperPConfig,
    *,
    pg_collection: Any = None,
    log: Callable[[str], None] | None = None,
) -> HyperPOptimizer:
    """Build the optimizer of a Megatron-Core model; a collective call of all ranks.

    Weights move into buffers of the optimizer's, matrices on spheres are scaled to their radii, and each data-parallel
    rank keeps the fp32 weights and state of what it owns. Frozen parameters are left alone.

    Args:
        model_chunks: this rank's chunks of the model, all of them bare modules or all wrapped by Megatron-Core's
            ``DistributedDataParallel``. Around bare modules gradients are reduced to their owners, half the traffic of
            an all-reduce: the schedules find how in the model's config, whose ``finalize_model_grads_func`` and
            ``no_sync_func`` are set here, and ``zero_grad`` of the optimizer clears them.
        config: how to update the model.
        pg_collection: a ``ProcessGroupCollection`` of Megatron-Core with tp, dp_cp, tp_dp_cp, expt_tp and expt_dp;
            None: the groups of its parallel state.
        log: receives the routing table, the balance of ownership and how Newton-Schulz is shared.

    Returns:
        A ``MegatronOptimizer``, which Megatron-Core's schedules and ``OptimizerParamScheduler`` drive.

    Raises:
        UsageError: no chunks, some wrapped and some not, wrapped for the distributed optimizer or by another wrapper,
            or a pattern of ``config.overrides`` that matches no trainable parameter on any rank.
        ValueError: see :func:`~megatron_hyperp.optim.routing.route`.
    """
    chunks = list(model_chunks)
    groups = Groups.of(pg_collection)
    wrapped = _are_wrapped(chunks)
    model_config: TransformerConfig = get_model_config(chunks[0])
    _check_overrides(chunks, config)
    if wrapped:
        exchange = Exchange(reduces=False)
    else:
        for chunk in chunks:
            mark_expert_parameters(chunk, groups.expert_tensor.size())
        exchange = wrap_for_data_parallelism(model_config, chunks, data_parallel_size=groups.data.size())[0].exchange
    return build_optimizer(chunks, config, exchange=exchange, groups=groups, heads=_heads(model_config), log=log)


def _are_wrapped(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether the chunks are wrapped by Megatron-Core's DistributedDataParallel."""
    if not chunks:
        raise UsageError("model_chunks is empty; give the list of this rank's model chunks")
    wrapped = [isinstance(chunk, DistributedDataParallel) for chunk in chunks]
    if any(wrapped) != all(wrapped):
        raise UsageError("some model chunks are wrapped by DistributedDataParallel and some are not; wrap all or none")
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.use_distributed_optimizer:
            raise UsageError(
                "the model is wrapped with use_distributed_optimizer=True, which cuts matrices between ranks; wrap it"
                " with use_distributed_optimizer=False, or pass the bare modules: state is sharded in both cases"
            )
        if not isinstance(chunk, DistributedDataParallel) and hasattr(chunk, "ddp_config"):
            raise UsageError(
                f"the model is wrapped by {type(chunk).__name__}; pass bare modules, or wrap them by Megatron-Core's"
                " DistributedDataParallel"
            )
    return wrapped[0]


def _heads(config: TransformerConfig) -> Heads:
    groups = config.num_query_groups or config.num_attention_heads
    return Heads(config.kv_channels, config.num_attention_heads // groups)


def _check_overrides(chunks: Sequence[torch.nn.Module], config: HyperPConfig) -> None:
    """See that every pattern matches something in some stage of the pipeline; a collective call."""
    if not config.overrides:
        return
    names = [name for chunk in chunks for name, parameter in named_parameters(chunk) if parameter.requires_grad]
    patterns = list(config.overrides)
    found = torch.tensor(
        [any(fnmatch.fnmatchcase(name, pattern) for name in names) for pattern in patterns],
        dtype=torch.float32,
        device=device.device(),
    )
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    unmatched = [pattern for pattern, count in zip(patterns, found.tolist(), strict=True) if not count]
    if unmatched:
        raise UsageError(
            f"the override(s) {', '.join(map(repr, unmatched))} match no trainable parameter; names look like"
            f" {names[0] if names else 'decoder.layers.0.mlp.linear_fc1.weight'}",
            same_on_all_ranks=True,
        )
