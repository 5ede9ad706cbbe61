"""What a step of the optimizer costs each rank: FLOPs, bytes and collectives, from the plan of ownership alone.

Gradients and weights travel in one bucket, as without overlap. ``benchmarks/optimizer_scaling`` compares the counts
with those of steps that are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_hyperp.config import Config
from megatron_hyperp.optim.ownership import partial_matrices
from megatron_hyperp.optim.tensor_parallel import Cost
from megatron_hyperp.planning.memory import Holding
from megatron_hyperp.planning.traffic import GRADIENT_BYTES, family_costs

FLOAT64 = 8
# ||W||^2, <W, U> and ||U||^2 of a matrix.
PRODUCTS = 4


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one rank spends on a step.

    Attributes:
        newton_schulz: of the matrices that it owns or shares.
        exchange: gradients to their owners, weights back.
        norms: sums over ranks for the gradient's norm and for matrices of which ranks hold parts.
        touched: bytes of fp32 weights, gradients and state that it owns, read or written once.
    """

    newton_schulz: Cost
    exchange: Cost
    norms: Cost
    touched: float

    @property
    def flops(self) -> float:
        """Of Newton-Schulz."""
        return self.newton_schulz.flops

    @property
    def sent(self) -> float:
        """Bytes, by ring algorithms."""
        return self.newton_schulz.sent + self.exchange.sent + self.norms.sent

    @property
    def collectives(self) -> int:
        """In which it meets other ranks."""
        return self.newton_schulz.collectives + self.exchange.collectives + self.norms.collectives


def step_costs(config: Config, world_size: int, held: Sequence[Holding]) -> list[StepCost]:
    """Return what a step costs each rank of a pipeline stage, in the order of the ranks.

    Args:
        config: resolved for ``world_size``.
        world_size: ranks of the job.
        held: what a rank of the stage holds, of :func:`~megatron_hyperp.planning.memory.holdings`.
    """
    ranks = world_size // config.parallel.pipeline_model_parallel_size
    exchange, norms = _total(_exchange(config, item) for item in held), _norms(held, world_size)
    # Neighbouring ranks own the same things: they share tensors, or hold other experts of as many.
    own = [[_total(family_costs(config, item, rank)) for rank in range(item.data)] for item in held]
    touched = [_touched(item) for item in held]
    return [
        StepCost(
            _total(own[index][rank * item.data // ranks] for index, item in enumerate(held)),
            exchange,
            norms,
            sum(touched[index][rank * item.data // ranks] for index, item in enumerate(held)),
        )
        for rank in range(ranks)
    ]


def _total(parts: Iterable[Cost]) -> Cost:
    items = list(parts)
    return Cost(
        sum(cost.flops for cost in items),
        sum(cost.sent for cost in items),
        sum(cost.copied for cost in items),
        sum(cost.collectives for cost in items),
    )


def _exchange(config: Config, item: Holding) -> Cost:
    """A reduce-scatter and an all-gather."""
    if item.data == 1:
        return Cost(0.0, 0.0, 0.0, 0)
    size = item.slots * (GRADIENT_BYTES + (2 if config.training.bf16 else 4))
    return Cost(0.0, size * (item.data - 1) / item.data, float(size), 2)


def _norms(held: Sequence[Holding], world_size: int) -> Cost:
    """Two all-reduces of one number over all ranks, and of three for each matrix over those that hold parts of it.

    The two are the gradient's norm, and whether an update is not finite.
    """
    sums = [(1, world_size), (1, world_size)]
    for number, item in enumerate(held):
        partial = partial_matrices(item.routes, item.plan, item.tensor, on_sphere=True)
        # Experts are cut over data-parallel ranks by elementwise rules alone, in an all-reduce of its own.
        sums.append((PRODUCTS * len(partial), item.tensor * (1 if number else item.data)))
        if number and any(entry.rule.on_sphere and not entry.rule.needs_matrix for entry in item.routes):
            sums.append((PRODUCTS * len(partial), item.data))
    sent = [2 * FLOAT64 * count * (ranks - 1) / ranks for count, ranks in sums if count and ranks > 1]
    return Cost(0.0, sum(sent), 0.0, len(sent))


def _touched(item: Holding) -> list[float]:
    """Bytes that each rank owns of gradients, fp32 weights and state."""
    result = [0.0] * item.data
    for piece in item.plan.pieces:
        state = item.routes[piece.route].rule.state_bytes(*piece.block.shape)
        result[piece.rank] += 8 * piece.block.numel + state
    return result
