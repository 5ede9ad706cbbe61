"""Ownership for the paper's models at depth 24, on meta tensors: balance, and when heavy matrices are shared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.ownership import Piece, Plan, plan_ownership
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.rules.muon import MuonHRule
from megatron_hyperp.optim.sphere import muonh_radius
from megatron_hyperp.optim.tensor_parallel import MACHINES, Job, predicted_seconds
from megatron_hyperp.parameters import REPLICATED, Block

DEPTH, WIDTH, HEAD = 24, 24 * 128, 128
TOP_K = 8
EXPERTS = 8 * TOP_K
NEWTON_SCHULZ, MACHINE = NewtonSchulz(dtype=torch.float16), MACHINES["cuda"]
RULE = MuonHRule(orthogonalizer=NEWTON_SCHULZ)


@pytest.fixture(autouse=True)
def _plan_for_cuda() -> Iterator[None]:
    """A CPU mirrors half of every symmetric product."""
    with device.planning_for("cuda"):
        yield


def matrix(name: str, rows: int, columns: int, dim: int, tensor_parallel_size: int) -> Route:
    local = [size // tensor_parallel_size if axis == dim else size for axis, size in enumerate((rows, columns))]
    parameter = torch.nn.Parameter(torch.empty(local, device="meta"))
    radius = muonh_radius(rows)
    return Route(name, parameter, Block.whole(parameter), "hidden", RULE, (rows, columns), dim, radius, 1.0, True)


def attention(layer: int, tensor_parallel_size: int) -> list[Route]:
    heads = 2 * DEPTH
    return [
        matrix(f"{layer}.linear_qkv", (heads + 8) * HEAD, WIDTH, 0, tensor_parallel_size),
        matrix(f"{layer}.linear_proj", WIDTH, heads * HEAD, 1, tensor_parallel_size),
    ]


def mlp(name: str, ffn: int, tensor_parallel_size: int) -> list[Route]:
    return [
        matrix(f"{name}.linear_fc1", 2 * ffn, WIDTH, 0, tensor_parallel_size),
        matrix(f"{name}.linear_fc2", WIDTH, ffn, 1, tensor_parallel_size),
    ]


def dense_model(tensor_parallel_size: int) -> list[Route]:
    return [
        entry
        for layer in range(DEPTH)
        for entry in attention(layer, tensor_parallel_size) + mlp(f"{layer}", 4 * WIDTH, tensor_parallel_size)
    ]


def experts(layer: int, numbers: Sequence[int], tensor_parallel_size: int) -> list[Route]:
    ffn = 4 * WIDTH // TOP_K
    return [entry for number in numbers for entry in mlp(f"{layer}.{number}", ffn, tensor_parallel_size)]


def moe_model(tensor_parallel_size: int) -> list[Route]:
    """One of the experts is shared."""
    routes = []
    for layer in range(DEPTH):
        routes += attention(layer, tensor_parallel_size)
        routes.append(matrix(f"{layer}.router", EXPERTS - 1, WIDTH, REPLICATED, tensor_parallel_size))
        routes += experts(layer, range(EXPERTS), tensor_parallel_size)
    return routes


def plan_of(routes: Sequence[Route], ranks: int, tensor_parallel_size: int, *, teams: bool = True) -> Plan:
    size = tensor_parallel_size
    return plan_ownership(routes, ranks, MACHINE, tensor_parallel_size=size, teams=teams)


def by_route(plan: Plan) -> Iterator[tuple[int, list[Piece]]]:
    return ((route, list(pieces)) for route, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.route))


def seconds(entry: Route, ranks: int, count: int = 1) -> float:
    """What one of ``count`` matrices costs each of the ranks that share them along their dimension."""
    job = Job(count, entry.shape[0], entry.shape[1], entry.partition_dim, ranks)
    return predicted_seconds(job, NEWTON_SCHULZ, MACHINE) / count


@pytest.mark.parametrize("tensor_parallel_size", [1, 8])
@pytest.mark.parametrize(("model", "ranks"), [(dense_model, 8), (moe_model, 8), (moe_model, 64)])
def test_work_is_balanced_without_teams(
    model: Callable[[int], list[Route]], ranks: int, tensor_parallel_size: int
) -> None:
    routes = model(tensor_parallel_size)
    plan = plan_of(routes, ranks, tensor_parallel_size)
    assert plan.imbalance < 1.05
    assert (plan.heavy, plan.team) == (0, 1)
    assert all(len(pieces) == 1 and pieces[0].block == routes[route].block for route, pieces in by_route(plan))
    assert plan.describe() == f"{ranks} data-parallel rank(s), Newton-Schulz load max/mean {plan.imbalance:.3f}"
    # Another tensor-parallel rank, which has other tensors of the same shapes, makes the same plan.
    assert plan_of(model(tensor_parallel_size), ranks, tensor_parallel_size) == plan


@pytest.mark.parametrize("tensor_parallel_size", [1, 8])
def test_experts_balance_what_the_dense_part_leaves(tensor_parallel_size: int) -> None:
    """64 experts without a shared one, 8 of them on each of 64 ranks, whose experts 8 ranks replicate."""
    parallel, ranks = 8, 64
    dense = []
    for layer in range(DEPTH):
        dense += attention(layer, tensor_parallel_size)
        dense.append(matrix(f"{layer}.router", EXPERTS, WIDTH, REPLICATED, tensor_parallel_size))
    plan = plan_of(dense, ranks, tensor_parallel_size)
    total = [0.0] * ranks
    per_rank = EXPERTS // parallel
    for place in range(parallel):
        numbers = range(place * per_rank, (place + 1) * per_rank)
        own = [entry for layer in range(DEPTH) for entry in experts(layer, numbers, tensor_parallel_size)]
        group = range(place, ranks, parallel)
        loads = [plan.loads[rank] for rank in group]
        part = plan_ownership(
            own,
            ranks // parallel,
            MACHINE,
            tensor_parallel_size=tensor_parallel_size,
            loads=loads,
            teams=False,
        )
        assert part.imbalance < 1.05
        assert part.team == 1
        for rank, before, after in zip(group, loads, part.loads, strict=True):
            assert after >= before - 1e-12
            total[rank] = after
    assert max(total) / (sum(total) / ranks) < 1.05


def test_a_heavy_matrix_is_shared_if_the_model_finds_that_faster() -> None:
    """Over 64 ranks the first MLP matrix alone is more than the mean load."""
    routes, ranks = dense_model(1), 64
    plan, alone = plan_of(routes, ranks, 1), plan_of(routes, ranks, 1, teams=False)
    mean = sum(alone.loads) / ranks
    heavy = [entry for entry in routes if seconds(entry, 1) > mean]
    assert [entry.name for entry in heavy] == [f"{layer}.linear_fc1" for layer in range(DEPTH)]
    assert (plan.heavy, alone.heavy, alone.team) == (len(heavy), len(heavy), 1)
    assert "24 weight(s) are heavier than the mean load, each with one owner" in alone.describe()
    # Newton-Schulz by itself gains nothing: were sharing in perfect balance, every rank would have more to do than the
    # busiest has without it.
    light = sum(seconds(entry, 1) for entry in routes if entry not in heavy)
    for team in (2, 4, 8, 16, 32, 64):
        count = -(-len(heavy) * team // ranks)
        shared = len(heavy) * team * seconds(heavy[0], team, count)
        assert (light + shared) / ranks > max(alone.loads)
    # What is gained is traffic: every rank's slot is as large as that of the owner of the largest matrix.
    assert plan.team > 1
    assert plan.seconds < 0.98 * alone.seconds
    assert f"shared by teams of {plan.team}" in plan.describe()


@pytest.mark.parametrize("ranks", [8, 64, 128, 256, 512])
def test_slots_are_never_much_larger_than_what_ranks_own(ranks: int) -> None:
    """Whatever the number of ranks, traffic stays below that of an all-reduce, which is twice what is owned."""
    plan = plan_of(dense_model(1), ranks, 1)
    owned = [0] * ranks
    for piece in plan.pieces:
        owned[piece.rank] += piece.block.numel
    assert max(owned) * ranks < 1.5 * sum(owned)


def test_heavy_matrices_are_shared_by_teams_where_that_is_faster() -> None:
    routes, ranks = dense_model(1), 256
    plan, alone = plan_of(routes, ranks, 1), plan_of(routes, ranks, 1, teams=False)
    assert plan.heavy == len(routes)
    assert plan.team > 1
    assert plan.seconds < 0.98 * alone.seconds
    assert f"{len(routes)} weight(s) are heavier than the mean load, shared by teams of {plan.team}" in plan.describe()
    found = dict(by_route(plan))
    assert len(found) == len(routes)
    for index, pieces in found.items():
        entry, dim = routes[index], pieces[0].team_dim
        # Along the long side, in equal slices.
        assert dim == (0 if entry.shape[0] > entry.shape[1] else 1)
        assert [piece.block for piece in pieces] == entry.block.cut(dim, plan.team)
        assert {piece.block.shape[dim] for piece in pieces} == {entry.shape[dim] // plan.team}
        assert {piece.team_dim for piece in pieces} == {dim}
        first = pieces[0].rank
        assert first % plan.team == 0
        assert [piece.rank for piece in pieces] == list(range(first, first + plan.team))
    assert plan_of(dense_model(1), ranks, 1) == plan
