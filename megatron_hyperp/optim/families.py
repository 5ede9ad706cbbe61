"""What a rank owns, in batches: pieces of one rule and shape are stacked and updated as one.

Between a stack and the model nothing is done piece by piece either: pieces that lie at equal distances in the model's
buffers, as the buckets place them, are one view of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp.megatron_compat.tensors import storage_of
from megatron_hyperp.optim.buckets import repeated
from megatron_hyperp.optim.domains import Domain
from megatron_hyperp.optim.ownership import Piece
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.rules import Part, UpdateRule
from megatron_hyperp.parameters import REPLICATED, Block


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces of a family that lie at equal distances in the model's memory.

    Attributes:
        pieces: which of the family's.
        weights: view of the model's weights, [pieces, groups, rows, columns].
        gradients: view of their ``main_grad``, the same shape.
    """

    pieces: slice
    weights: torch.Tensor
    gradients: torch.Tensor

    def of(self, stacked: torch.Tensor) -> torch.Tensor:
        """Return the pieces of a [count, rows, columns] stack as a view of the shape of :attr:`weights`."""
        return stacked[self.pieces].view(self.weights.shape)


@dataclass(slots=True)
class Family:
    """What this rank owns of parameters that are updated as one batch.

    Attributes:
        routes: their rules, all alike but for the names.
        blocks: the part of each that this rank owns.
        domain: where they belong.
        share_group: ranks that share the matrices' Newton-Schulz.
        share_dim: the dimension along which they are split over those, or REPLICATED or DISTINCT.
        master: fp32 weights [count, rows, columns].
        state: the rule's state by name, stacked: [count, rows, columns] or [count, rows, 1].
        radii: [count] float64; empty off the sphere.
        places: [count], in the domain's sums over matrices on the sphere, or over those off it; empty where this rank
            holds whole matrices.
        runs: where the pieces are in the model; each is in one run.
        group: the ``param_groups`` entry with its learning rate and weight decay.
    """

    routes: list[Route]
    blocks: list[Block]
    domain: Domain
    share_group: dist.ProcessGroup
    share_dim: int
    master: torch.Tensor
    state: dict[str, torch.Tensor]
    radii: torch.Tensor
    places: torch.Tensor
    runs: list[Run]
    group: dict[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> UpdateRule:
        """The update rule of all its parameters."""
        return self.routes[0].rule

    def part(self, step: int, strategy: str) -> Part:
        """Return how its stacks are related to whole matrices, for the rule.

        Args:
            step: number of this step, from 1.
            strategy: how ranks share Newton-Schulz.
        """
        rows, *others = self.routes[0].shape
        return Part(step, rows, math.prod(others), self.share_dim, self.share_group, strategy)

    @property
    def scale(self) -> float:
        """Factor on the learning rate off the sphere."""
        rows, *others = self.routes[0].shape
        return self.rule.scale(rows, math.prod(others))

    @property
    def counts(self) -> bool:
        """Whether this rank counts it in global sums: of equal copies on tensor-parallel ranks, the first."""
        return self.routes[0].partition_dim != REPLICATED or self.domain.tensor.rank() == 0

    def read_weights(self) -> None:
        """Take the model's weights as masters."""
        for run in self.runs:
            run.of(self.master).copy_(run.weights)

    def write_weights(self) -> None:
        """Write the masters into the model, rounded to its precision."""
        for run in self.runs:
            run.weights.copy_(run.of(self.master))

    def gradients(self) -> torch.Tensor:
        """A copy of the reduced gradients, fp32 [count, rows, columns]."""
        stacked = torch.empty_like(self.master)
        for run in self.runs:
            run.of(stacked).copy_(run.gradients)
        return stacked

    def tensors(self) -> dict[str, torch.Tensor]:
        """Master and state by name."""
        return {"master": self.master, **self.state}


def families_of(domain: Domain) -> list[Family]:
    """Group what this rank owns of a domain into families; masters are still zero.

    Families and their pieces are in the order of the plan, so the ranks that share one agree on it. The buckets must be
    laid out, for the families keep views of them.

    Args:
        domain: the parameters.
    """
    families: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in domain.mine:
        entry = domain.routes[piece.route]
        shared = getattr(entry.parameter, "shared", False)
        kind = (entry.rule, entry.role, entry.lr_mult, entry.decays, shared)
        shape = (entry.shape, entry.partition_dim, piece.block.shape, piece.team_dim)
        families.setdefault((kind, shape), []).append(piece)
    places = domain.places(on_sphere=True) | domain.places(on_sphere=False)
    return [_family(domain, pieces, places) for pieces in families.values()]


def _family(domain: Domain, pieces: list[Piece], places: dict[int, int]) -> Family:
    routes, blocks = [domain.routes[piece.route] for piece in pieces], [piece.block for piece in pieces]
    first, team_dim = routes[0], pieces[0].team_dim
    home = first.parameter.device
    master = torch.zeros((len(pieces), *blocks[0].shape), device=home)
    # State is created here and now: made at the first step it could differ between ranks and hang a checkpoint.
    state = {
        name: torch.zeros((len(pieces), *entry.of(*blocks[0].shape)), dtype=entry.dtype, device=home)
        for name, entry in first.rule.entries().items()
    }
    radii = [entry.radius for entry in routes if entry.radius is not None]
    share_group = domain.tensor if team_dim is None else domain.team
    assert share_group is not None
    return Family(
        routes,
        blocks,
        domain,
        share_group,
        first.partition_dim if team_dim is None else team_dim,
        master,
        state,
        torch.tensor(radii, dtype=torch.float64, device=home),
        torch.tensor([places[piece.route] for piece in pieces if piece.route in places], dtype=torch.long, device=home),
        runs_of(routes, blocks),
    )


def runs_of(routes: Sequence[Route], blocks: Sequence[Block]) -> list[Run]:
    """Find the runs of a family: few, and no more for more pieces, where the buckets stacked their parameters.

    Args:
        routes: whose parameters live in buckets.
        blocks: the part of each, all of one shape.
    """
    places: dict[tuple[Any, ...], list[_Place]] = {}
    for index, (entry, block) in enumerate(zip(routes, blocks, strict=True)):
        weight = block.of(entry.parameter.detach())
        gradient = block.of(entry.parameter.main_grad)  # type: ignore[attr-defined]
        # Parts of a parameter, such as gate and up, alternate: each of them is regular by itself.
        buffers = storage_of(weight), storage_of(gradient)
        place = _Place(index, weight, gradient)
        places.setdefault((entry.parameter.shape, block, buffers), []).append(place)
    return [_run(alike) for group in places.values() for alike in _regular(group)]


@dataclass(frozen=True, slots=True)
class _Place:
    """A piece: its index in the family and its views of the model, [groups, rows, columns]."""

    index: int
    weight: torch.Tensor
    gradient: torch.Tensor

    def steps_from(self, other: _Place) -> tuple[int, int, int]:
        """Distances in the family, the weights and the gradients."""
        return (
            self.index - other.index,
            int(self.weight.storage_offset() - other.weight.storage_offset()),
            int(self.gradient.storage_offset() - other.gradient.storage_offset()),
        )


def _regular(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Cut places in one pair of buffers into runs of which neighbours are equally far apart."""
    run = [places[0]]
    for place in places[1:]:
        steps = place.steps_from(run[-1])
        # A view's strides are not negative.
        if min(steps) <= 0 or (len(run) > 1 and steps != run[-1].steps_from(run[-2])):
            yield run
            run = []
        run.append(place)
    yield run


def _run(places: Sequence[_Place]) -> Run:
    first, last, count = places[0], places[-1], len(places)
    skip, weight_step, gradient_step = places[1].steps_from(first) if count > 1 else (1, 1, 1)
    return Run(
        slice(first.index, last.index + 1, skip),
        repeated(first.weight, count, weight_step),
        repeated(first.gradient, count, gradient_step),
    )
