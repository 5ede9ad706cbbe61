"""Which data-parallel rank owns what of the optimizer: its fp32 weights, its state, its share of the work.

Matrices whose rule needs them whole are owned whole, dealt out by longest processing time on the cost of Newton-Schulz;
all else is cut into equal runs of rows. Where a matrix alone is more work than a rank's fair share, a team of
neighbouring ranks may own it together, each a slice of it, if the cost model finds that faster. The plan depends on
shapes alone, so every tensor-parallel rank makes the same one. No communication here.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.rules import UpdateRule
from megatron_hyperp.optim.tensor_parallel import AUTO, Job, Machine, predicted_seconds
from megatron_hyperp.parameters import DISTINCT, REPLICATED, Block

# Loads are whole picoseconds: sums of equal costs then tie exactly, and ties are dealt out in turn.
PICOSECONDS = 1e12
# Bytes per element of a gradient in fp32 on its way to the owner, and of a weight in bf16 on its way back.
TRAVELLING_BYTES = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank owns of one route.

    Attributes:
        route: index into the routes.
        rank: its owner, within the data-parallel group.
        block: the part of the rank's parameter.
        team_dim: dimension along which a team shares the matrix; None if the owner has all of it, or its rule is
            elementwise.
    """

    route: int
    rank: int
    block: Block
    team_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Who owns what.

    Attributes:
        pieces: of every rank, in the order of the routes.
        loads: predicted seconds of Newton-Schulz for each rank.
        team: ranks that share a heavy matrix; 1 if none is shared.
        heavy: matrices that are more work than the mean load.
        travel: predicted seconds in which gradients reach their owners and weights come back. All ranks' slots are as
            large as the largest, so few owners of large matrices cost traffic, too.
    """

    pieces: list[Piece]
    loads: list[float]
    team: int
    heavy: int
    travel: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted time of a step for the busiest rank."""
        return max(self.loads) + self.travel

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load; 1 if there is no work."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean if mean else 1.0

    def describe(self) -> str:
        """One line on the balance."""
        line = f"{len(self.loads)} data-parallel rank(s), Newton-Schulz load max/mean {self.imbalance:.3f}"
        if self.heavy:
            line += f"; {self.heavy} weight(s) are heavier than the mean load, "
            line += f"shared by teams of {self.team}" if self.team > 1 else "each with one owner"
        return line


def partial_matrices(routes: Sequence[Route], plan: Plan, tensor_parallel_size: int, *, on_sphere: bool) -> list[int]:
    """Return the indices of matrices, on the sphere or off it, of which a rank holds only a part."""
    pieces = Counter(piece.route for piece in plan.pieces)
    return [
        index
        for index, entry in enumerate(routes)
        if (entry.is_matrix or on_sphere)
        and entry.rule.on_sphere == on_sphere
        and (pieces[index] > 1 or (entry.partition_dim in (0, 1) and tensor_parallel_size > 1))
    ]


@dataclass(frozen=True, slots=True)
class _Pricing:
    """What a matrix costs: the inputs of the cost model."""

    machine: Machine
    tensor_parallel_size: int
    strategy: str
    alike: Counter[tuple[UpdateRule, tuple[int, ...]]]
    ranks: int
    known: dict[tuple[UpdateRule, tuple[int, ...], int, int], float] = field(default_factory=dict)

    def of(self, entry: Route, team: int = 1) -> float:
        """Seconds that one matrix costs each rank of a team, as one of the equal ones that the team has."""
        if not entry.rule.needs_matrix:
            return 0.0
        key = (entry.rule, entry.shape, entry.partition_dim, team)
        if key not in self.known:
            self.known[key] = self._price(entry, team)
        return self.known[key]

    def _price(self, entry: Route, team: int) -> float:
        count = -(-self.alike[entry.rule, entry.shape] * team // self.ranks)
        tensor_ranks = 1 if entry.partition_dim == DISTINCT else self.tensor_parallel_size
        dim = entry.partition_dim if team == 1 else _team_dim(entry, self.tensor_parallel_size)
        assert dim is not None
        rows, columns = entry.shape
        # Elements that are read and written once, at least: what needs a matrix has an owner, however cheap it is.
        flops = max(entry.rule.flops(rows, columns), rows * columns)
        seconds = flops / (tensor_ranks * team) / self.machine.flops
        newton_schulz = entry.rule.newton_schulz
        if newton_schulz is None:
            return seconds
        job = Job(count, rows, columns, dim, tensor_ranks * team)
        return predicted_seconds(job, newton_schulz, self.machine, self.strategy) / count


def longest_processing_time(costs: Sequence[int], loads: list[int]) -> list[int]:
    """Deal out jobs, the longest first, each to the rank with the least load; return each job's rank.

    Ties go to the lowest rank and the first job.

    Args:
        costs: of the jobs.
        loads: of the ranks, updated in place.
    """
    owners = [0] * len(costs)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, rank = heap[0]
        owners[job], loads[rank] = rank, load + costs[job]
        heapq.heapreplace(heap, (loads[rank], rank))
    return owners


def plan_ownership(
    routes: Sequence[Route],
    ranks: int,
    machine: Machine,
    *,
    tensor_parallel_size: int = 1,
    strategy: str = AUTO,
    loads: Sequence[float] | None = None,
    teams: bool = True,
) -> Plan:
    """Assign every route to data-parallel ranks.

    Args:
        routes: of all parameters that these ranks replicate, parts of one parameter next to each other; one rank owns
            all parts of a parameter, whose gradient then is one contiguous piece.
        ranks: data-parallel ranks.
        machine: rates for the cost model.
        tensor_parallel_size: ranks over which matrices are sharded.
        strategy: how those share Newton-Schulz.
        loads: seconds of other work that the ranks already have.
        teams: whether heavy matrices may be shared.

    Returns:
        The fastest plan, of those in which matrices heavier than the mean load are owned by teams of 1, 2, 4, ...
        ranks. A larger team must save 2% or more.
    """
    alike = Counter((entry.rule, entry.shape) for entry in routes if entry.rule.needs_matrix)
    pricing = _Pricing(machine, tensor_parallel_size, strategy, alike, ranks)
    units = [list(unit) for _, unit in groupby(range(len(routes)), key=lambda index: id(routes[index].parameter))]
    costs = [sum(pricing.of(routes[index]) for index in unit) for unit in units]
    mean = (sum(costs) + sum(loads or [])) / ranks
    # A sum of equal costs is not heavier than itself.
    heavy = [number for number, cost in enumerate(costs) if cost > mean * (1 + 1e-9)]
    # The same in every plan: what is updated elementwise costs next to nothing and is cut.
    spread = {
        index: [Piece(index, rank, block) for rank, block in enumerate(routes[index].block.cut(0, ranks))]
        for unit, cost in zip(units, costs, strict=True)
        if not cost
        for index in unit
    }
    best: Plan | None = None
    for team in _team_sizes(ranks) if heavy and teams else [1]:
        plan = _plan_with(team, routes, units, costs, heavy, spread, pricing, list(loads or [0.0] * ranks))
        if best is None or plan.seconds < 0.98 * best.seconds:
            best = plan
    assert best is not None
    return best


def _team_sizes(ranks: int) -> list[int]:
    """1 and the powers of two that divide the number of ranks."""
    return [1 << power for power in range(ranks.bit_length()) if ranks % (1 << power) == 0]


def _plan_with(
    team: int,
    routes: Sequence[Route],
    units: list[list[int]],
    costs: list[float],
    heavy: list[int],
    spread: dict[int, list[Piece]],
    pricing: _Pricing,
    loads: list[float],
) -> Plan:
    """Give heavy parameters to teams, then the others to single ranks."""
    ranks, shares = len(loads), pricing.tensor_parallel_size
    shared = {n for n in heavy if all(_cut(routes[i], team, shares) for i in units[n])} if team > 1 else set()
    totals = [round(PICOSECONDS * load) for load in loads]
    owner_of: dict[int, int] = {}
    if shared:
        prices = [sum(round(PICOSECONDS * pricing.of(routes[i], team)) for i in units[n]) for n in sorted(shared)]
        busiest = [max(totals[first : first + team]) for first in range(0, ranks, team)]
        owners = longest_processing_time(prices, busiest)
        for number, price, owner in zip(sorted(shared), prices, owners, strict=True):
            owner_of[number] = owner
            for rank in range(owner * team, (owner + 1) * team):
                totals[rank] += price
    single = [number for number, cost in enumerate(costs) if cost and number not in owner_of]
    owners = longest_processing_time([round(PICOSECONDS * costs[number]) for number in single], totals)
    owner_of.update(zip(single, owners, strict=True))
    pieces: list[Piece] = []
    for number, unit in enumerate(units):
        size = team if number in shared else 1
        for index in unit:
            pieces += spread.get(index) or _pieces(index, routes[index], owner_of[number], size, shares)
    owned = [0] * ranks
    for piece in pieces:
        owned[piece.rank] += piece.block.numel
    travel = (ranks - 1) * max(owned) * TRAVELLING_BYTES / pricing.machine.bytes_per_s
    return Plan(pieces, [total / PICOSECONDS for total in totals], team if shared else 1, len(heavy), travel)


def _pieces(index: int, entry: Route, owner: int, team: int, tensor_parallel_size: int) -> list[Piece]:
    """Return the pieces of a route that a rank owns, or a team."""
    if team == 1:
        return [Piece(index, owner, entry.block)]
    dim, slices = _team_dim(entry, tensor_parallel_size), _cut(entry, team, tensor_parallel_size)
    return [Piece(index, owner * team + member, block, dim) for member, block in enumerate(slices)]


def _team_dim(entry: Route, tensor_parallel_size: int) -> int | None:
    """Dimension along which a team shares a matrix: the one that tensor-parallel ranks do, else the long one."""
    if tensor_parallel_size == 1 and entry.partition_dim != DISTINCT:
        return 0 if entry.shape[0] >= entry.shape[1] else 1
    return entry.partition_dim if entry.partition_dim not in (REPLICATED, DISTINCT) else None


def _cut(entry: Route, team: int, tensor_parallel_size: int) -> list[Block]:
    """Return the equal slices of a matrix for a team, or none if it cannot be cut so."""
    dim = _team_dim(entry, tensor_parallel_size)
    if dim is None:
        return []
    length = entry.block.rows if dim == 0 else entry.block.columns
    return entry.block.cut(dim, team) if length % team == 0 else []
