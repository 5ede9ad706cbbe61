"""Ownership: who owns what of small models, whole or in teams, and how jobs are dealt out."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.ownership import Piece, Plan, longest_processing_time, plan_ownership
from megatron_hyperp.optim.routing import Heads, Route, route
from megatron_hyperp.optim.tensor_parallel import Job, Machine, predicted_seconds
from megatron_hyperp.parameters import DISTINCT

NEWTON_SCHULZ = NewtonSchulz(dtype=torch.float32)
# Arithmetic is all that costs, so that whatever can be shared is; and nothing but latency costs, so that nothing is.
SHARING, SINGLE = Machine(1e6, 1e15, 0.0, 1e15), Machine(1e9, 1e15, 1.0, 1e15)
GROUPS, HEADS, WIDTH = 4, Heads(size=8, queries=3), 32
# Global shape and the dimension that tensor-parallel ranks split.
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "embedding.word_embeddings.weight": ((104, WIDTH), 0),
    **{
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in {
            "input_layernorm.weight": ((WIDTH,), None),
            "self_attention.linear_qkv.weight": ((GROUPS * 5 * 8, WIDTH), 0),
            "self_attention.linear_proj.weight": ((WIDTH, 96), 1),
            "mlp.linear_fc1.weight": ((2 * 4 * WIDTH, WIDTH), 0),
            "mlp.linear_fc2.weight": ((WIDTH, 4 * WIDTH), 1),
        }.items()
    },
    "output_layer.weight": ((104, WIDTH), 0),
}


def small_model(tensor_parallel_size: int, split: str = "fused", optimizer: str = "hyperp") -> list[Route]:
    pairs = []
    for name, (shape, dim) in SHAPES.items():
        local = [size // tensor_parallel_size if axis == dim else size for axis, size in enumerate(shape)]
        parameter = torch.nn.Parameter(torch.empty(local, device="meta"))
        if dim is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, dim  # type: ignore[attr-defined]
        pairs.append((name, parameter))
    options = HyperPConfig(lr=1.0, optimizer=optimizer, matrix_split=split)  # type: ignore[arg-type]
    return route(pairs, options, tensor_parallel_size=tensor_parallel_size, heads=HEADS)


def plan_of(routes: Sequence[Route], ranks: int, machine: Machine = SINGLE, tensor_parallel_size: int = 1) -> Plan:
    return plan_ownership(routes, ranks, machine, tensor_parallel_size=tensor_parallel_size)


def by_route(plan: Plan) -> dict[int, list[Piece]]:
    return {route: list(pieces) for route, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.route)}


LAYOUTS = [
    (machine, split, tensor_parallel_size, ranks)
    for machine in (SINGLE, SHARING)
    for split in ("fused", "component", "head")
    for tensor_parallel_size in (1, 2)
    for ranks in (1, 2, 3, 8, 12, 64)
]


@pytest.mark.parametrize(("machine", "split", "tensor_parallel_size", "ranks"), LAYOUTS)
def test_pieces_tile_every_parameter(machine: Machine, split: str, tensor_parallel_size: int, ranks: int) -> None:
    """Every element of every parameter has one owner, and the pieces come in the order of the routes."""
    routes = small_model(tensor_parallel_size, split)
    plan = plan_of(routes, ranks, machine, tensor_parallel_size)
    assert list(by_route(plan)) == list(range(len(routes)))
    times = {entry.parameter: torch.zeros(entry.parameter.shape, dtype=torch.int64) for entry in routes}
    for piece in plan.pieces:
        assert 0 <= piece.rank < ranks
        piece.block.of(times[routes[piece.route].parameter]).add_(1)
    assert all(bool((covered == 1).all()) for covered in times.values())


@pytest.mark.parametrize(("machine", "split", "tensor_parallel_size", "ranks"), LAYOUTS)
def test_matrices_have_one_owner_or_one_team(
    machine: Machine, split: str, tensor_parallel_size: int, ranks: int
) -> None:
    """One for all parts of a parameter; a team has equal slices, on aligned consecutive ranks."""
    routes = small_model(tensor_parallel_size, split)
    plan = plan_of(routes, ranks, machine, tensor_parallel_size)
    owners: dict[torch.nn.Parameter, set[tuple[int, ...]]] = {}
    for index, pieces in by_route(plan).items():
        entry = routes[index]
        members = tuple(piece.rank for piece in pieces)
        if entry.rule.needs_matrix:
            owners.setdefault(entry.parameter, set()).add(members)
            dims = {piece.team_dim for piece in pieces}
            if len(pieces) == 1:
                assert (dims, pieces[0].block) == ({None}, entry.block)
            else:
                assert len(pieces) == plan.team
                assert members == tuple(range(members[0], members[0] + plan.team))
                assert members[0] % plan.team == 0
                assert len({piece.block.shape for piece in pieces}) == 1
                # Tensor-parallel ranks and the team split the same dimension.
                assert dims in ({0}, {1})
                assert tensor_parallel_size == 1 or dims == {entry.partition_dim}
        else:
            assert members == tuple(range(len(pieces)))
            assert [piece.block for piece in pieces] == entry.block.cut(0, ranks)
            assert {piece.team_dim for piece in pieces} == {None}
    assert {len(members) for members in owners.values()} == {1}


@pytest.mark.parametrize(("machine", "split", "tensor_parallel_size", "ranks"), LAYOUTS)
def test_loads_are_the_costs_of_what_is_owned(
    machine: Machine, split: str, tensor_parallel_size: int, ranks: int
) -> None:
    """On top of the work that the ranks already had."""
    routes = small_model(tensor_parallel_size, split)
    loads = [float(rank % 3) for rank in range(ranks)]
    plan = plan_ownership(routes, ranks, machine, tensor_parallel_size=tensor_parallel_size, loads=loads)
    alike = Counter(entry.shape for entry in routes if entry.rule.needs_matrix)
    for index, pieces in by_route(plan).items():
        entry, team = routes[index], len(pieces)
        if not entry.rule.needs_matrix:
            continue
        # As one of the matrices of its shape that a rank has.
        count = -(-alike[entry.shape] * team // ranks)
        tensor_ranks = 1 if entry.partition_dim == DISTINCT else tensor_parallel_size
        dim = pieces[0].team_dim if pieces[0].team_dim is not None else entry.partition_dim
        job = Job(count, entry.shape[0], entry.shape[1], dim, tensor_ranks * team)
        for piece in pieces:
            loads[piece.rank] += predicted_seconds(job, NEWTON_SCHULZ, machine) / count
    assert plan.loads == pytest.approx(loads, rel=1e-6)


def test_the_layouts_above_have_teams_and_none() -> None:
    teams = {
        (machine, split, tp, ranks): plan_of(small_model(tp, split), ranks, machine, tp).team
        for machine, split, tp, ranks in LAYOUTS
    }
    assert {team for (machine, *_), team in teams.items() if machine is SINGLE} == {1}
    assert len({team for (machine, *_), team in teams.items() if machine is SHARING}) > 3
    # Only powers of two that divide the ranks.
    assert all(ranks % team == 0 and team & (team - 1) == 0 for (*_, ranks), team in teams.items())


@pytest.mark.parametrize("machine", [SINGLE, SHARING])
def test_the_plan_depends_on_shapes_alone(machine: Machine) -> None:
    """Other tensors of the same shapes, as another tensor-parallel rank has, get the same plan."""
    first, second = (plan_of(small_model(2, "component"), 8, machine, 2) for _ in range(2))
    assert first == second


def test_without_matrices_there_is_no_load() -> None:
    plan = plan_of(small_model(1, optimizer="adamw"), 4)
    assert (plan.loads, plan.imbalance, plan.heavy, plan.team) == ([0.0] * 4, 1.0, 0, 1)
    assert {piece.rank for piece in plan.pieces} == set(range(4))


def test_one_rank_owns_everything_whole() -> None:
    routes = small_model(1)
    plan = plan_of(routes, 1)
    assert plan.pieces == [Piece(index, 0, entry.block) for index, entry in enumerate(routes)]


def test_given_loads_are_respected() -> None:
    routes = small_model(1)
    free = plan_of(routes, 4)
    # More work than all of Newton-Schulz: a rank that has it gets none.
    busy = sum(free.loads)
    plan = plan_ownership(routes, 4, SINGLE, loads=[0.0, busy, 0.0, busy], teams=False)
    owners = {piece.rank for piece in plan.pieces if routes[piece.route].rule.needs_matrix}
    assert owners == {0, 2}
    assert [plan.loads[1], plan.loads[3]] == pytest.approx([busy, busy])
    assert sum(plan.loads) == pytest.approx(3 * busy)
    # Beside loads that are all equal the plan is that without them.
    same = plan_ownership(routes, 4, SINGLE, loads=[busy] * 4)
    assert same.pieces == free.pieces


def single(*shape: int) -> Route:
    """One matrix, of which there is no other."""
    name, parameter = "decoder.layers.0.mlp.linear_fc2.weight", torch.nn.Parameter(torch.empty(shape, device="meta"))
    (entry,) = route([(name, parameter)], HyperPConfig(lr=1.0), tensor_parallel_size=1)
    return entry


def test_what_is_heavy_depends_on_the_given_loads() -> None:
    entry = single(32, 128)
    free = plan_of([entry], 4, SHARING)
    assert free.heavy == 1
    busy = plan_ownership([entry], 4, SHARING, loads=[2 * sum(free.loads)] * 4)
    assert (busy.heavy, busy.team) == (0, 1)


def test_a_team_is_made_of_the_least_loaded_ranks() -> None:
    entry = single(32, 512)
    half = predicted_seconds(Job(1, 32, 512, 1, 2), NEWTON_SCHULZ, SHARING)
    plan = plan_ownership([entry], 4, SHARING, loads=[half, half, 0.0, 0.0])
    assert [(piece.rank, piece.block) for piece in plan.pieces] == list(zip((2, 3), entry.block.cut(1, 2), strict=True))
    assert plan.loads == pytest.approx([half] * 4)


@pytest.mark.parametrize(("columns", "team"), [(512, 8), (516, 4), (514, 2), (513, 1)])
def test_only_equal_slices_are_shared(columns: int, team: int) -> None:
    plan = plan_of([single(16, columns)], 8, SHARING)
    assert (plan.heavy, plan.team, len(plan.pieces)) == (1, team, team)


# Longest processing time


def smallest_largest_load(costs: Sequence[int], ranks: int) -> int:
    """The optimum, by trying every assignment."""
    return min(
        max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_longest_processing_time_is_near_the_optimum(ranks: int) -> None:
    """At most 4/3 - 1/(3 ranks) of it (R. L. Graham, 1969)."""
    numbers = random.Random(0)
    for _ in range(30):
        costs = [numbers.randint(1, 20) for _ in range(numbers.randint(1, 7))]
        loads = [0] * ranks
        owners = longest_processing_time(costs, loads)
        owned = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
        assert loads == owned
        assert 3 * ranks * max(loads) <= (4 * ranks - 1) * smallest_largest_load(costs, ranks)


def test_ties_go_to_the_lowest_rank_and_the_first_job() -> None:
    assert longest_processing_time([5] * 7, [0] * 3) == [0, 1, 2, 0, 1, 2, 0]
    assert longest_processing_time([1, 2, 1, 2], [0, 0]) == [0, 0, 1, 1]
    assert longest_processing_time([], [3, 1]) == []


def test_the_longest_job_goes_to_the_least_loaded_rank() -> None:
    loads = [10, 0, 4]
    assert longest_processing_time([3, 5], loads) == [2, 1]
    assert loads == [10, 5, 7]
