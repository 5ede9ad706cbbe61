"""Bytes that a rank needs: weights, gradients, optimizer state, activations.

Weights, gradients and state follow the plan of ownership that the optimizer itself makes. Activations are what
Megatron-Core's local layers keep for the backward pass. Both are compared with real models, in test_memory.py of
``tests/distributed`` and ``tests/unit``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_hyperp.config import Config, micro_batches
from megatron_hyperp.optim.buckets import aligned
from megatron_hyperp.optim.ownership import Piece, Plan, plan_ownership
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.tensor_parallel import machine
from megatron_hyperp.optimizer_options import routes_of
from megatron_hyperp.parameters import is_expert
from megatron_hyperp.planning.activations import activation_bytes
from megatron_hyperp.planning.inventory import stage_parameters


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest rank of a pipeline stage.

    Attributes:
        weights: in the precision of training.
        gradients: fp32, summed over micro-batches.
        master: fp32 weights of what the rank owns.
        momentum: of Muon, and both moments of Adam, of what it owns.
        activations: kept for the backward pass, of all micro-batches in flight.
        step: what the optimizer's step needs besides: gradients and directions of what the rank owns. Activations are
            gone by then.
    """

    weights: int
    gradients: int
    master: int
    momentum: int
    activations: int
    step: int

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer state: what stays from step to step."""
        return self.weights + self.gradients + self.master + self.momentum

    @property
    def total(self) -> int:
        """The peak."""
        return self.states + max(self.activations, self.step)

    def to_dict(self) -> dict[str, int]:
        """Return the parts and the total by name."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Holding:
    """Parameters that the same ranks replicate, as one rank of a stage holds them, and who owns what of them.

    Attributes:
        routes: their rules.
        plan: of ownership.
        data: ranks that replicate them.
        tensor: ranks that share each matrix.
    """

    routes: list[Route]
    plan: Plan
    data: int
    tensor: int

    @functools.cached_property
    def slots(self) -> int:
        """Elements of the equal slots in which gradients travel to their owners, and weights back."""
        fill = [0] * self.data
        for piece in self.plan.pieces:
            parameter = self.routes[piece.route].parameter
            if self._shared[id(parameter)]:
                fill[piece.rank] += piece.block.numel
        whole = {id(self.routes[piece.route].parameter): piece for piece in self.plan.pieces}
        for key, piece in whole.items():
            if not self._shared[key]:
                fill[piece.rank] += aligned(self.routes[piece.route].parameter.numel())
        return self.data * aligned(max(fill))

    @functools.cached_property
    def buffered(self) -> int:
        """Elements of a buffer of gradients or weights: the slots, and beside them what several ranks share."""
        parameters = {id(entry.parameter): entry.parameter for entry in self.routes}
        return self.slots + sum(aligned(item.numel()) for key, item in parameters.items() if self._shared[key])

    @functools.cached_property
    def _shared(self) -> dict[int, bool]:
        """Whether several ranks own a parameter, by its id."""
        owners: dict[int, set[int]] = {}
        for piece in self.plan.pieces:
            owners.setdefault(id(self.routes[piece.route].parameter), set()).add(piece.rank)
        return {key: len(ranks) > 1 for key, ranks in owners.items()}

    @functools.cached_property
    def orthogonalized(self) -> list[list[Piece]]:
        """What each rank owns of the matrices that are orthogonalized."""
        result: list[list[Piece]] = [[] for _ in range(self.data)]
        for piece in self.plan.pieces:
            if self.routes[piece.route].rule.newton_schulz is not None:
                result[piece.rank].append(piece)
        return result

    @functools.cached_property
    def owned(self) -> tuple[int, int]:
        """Elements that the fullest rank owns, and the bytes of their state."""
        elements, state = [0] * self.data, [0] * self.data
        for piece in self.plan.pieces:
            elements[piece.rank] += piece.block.numel
            state[piece.rank] += self.routes[piece.route].rule.state_bytes(*piece.block.shape)
        fullest = max(range(self.data), key=lambda rank: (4 * elements[rank] + state[rank], rank))
        return elements[fullest], state[fullest]


def holdings(config: Config, world_size: int, stage: int) -> list[Holding]:
    """Return what a rank of a pipeline stage holds: all but the experts, then the experts if there are any.

    Args:
        config: resolved for ``world_size``.
        world_size: ranks of the job.
        stage: pipeline stage.
    """
    parallel = config.parallel
    routes = routes_of(config, stage_parameters(config, stage))
    stages = parallel.pipeline_model_parallel_size
    tensor, expert_tensor = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    data = world_size // stages // tensor
    dense = [entry for entry in routes if not is_expert(entry.parameter)]
    result = [_holding(config, dense, data, tensor, [0.0] * data)]
    experts = [entry for entry in routes if is_expert(entry.parameter)]
    if experts:
        # Megatron-Core numbers the ranks that share an expert first, then those that share the experts of a layer.
        sharing = expert_tensor * parallel.expert_model_parallel_size
        loads = [result[0].plan.loads[first // tensor] for first in range(0, world_size // stages, sharing)]
        result.append(_holding(config, experts, len(loads), expert_tensor, loads))
    return result


def _holding(config: Config, routes: list[Route], data: int, tensor: int, loads: list[float]) -> Holding:
    plan = plan_ownership(
        routes,
        data,
        machine(),
        tensor_parallel_size=tensor,
        strategy=config.optimizer.ns_strategy,
        loads=loads,
        teams=not is_expert(routes[0].parameter),
    )
    return Holding(routes, plan, data, tensor)


def stage_memory(config: Config, world_size: int, stage: int, held: Sequence[Holding]) -> Memory:
    """Return the bytes on the fullest rank of one stage; ``held`` is of :func:`holdings`, with the same arguments."""
    weight = 2 if config.training.bf16 else 4
    buffered = owned = state = 0
    for holding in held:
        elements, moments = holding.owned
        buffered += holding.buffered
        owned += elements
        state += moments
    return Memory(
        weights=weight * buffered,
        gradients=4 * buffered,
        master=4 * owned,
        momentum=state,
        activations=activation_bytes(config, stage, micro_batches(config, world_size)),
        step=8 * owned,
    )
