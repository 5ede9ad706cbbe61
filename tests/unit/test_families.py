"""Families live in the buckets as stacks: their views are the model's memory."""

from __future__ import annotations

import datetime
from typing import cast

import pytest
import torch
import torch.distributed as dist

from megatron_hyperp.optim.buckets import Bucket, Share
from megatron_hyperp.optim.families import Run, runs_of
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.rules.muon import MuonHRule
from megatron_hyperp.parameters import REPLICATED, Block


def routes_of(parameter: torch.nn.Parameter, blocks: list[Block]) -> list[Route]:
    return [
        Route("weight", parameter, block, "hidden", MuonHRule(), block.shape, REPLICATED, 1.0, 1.0, True)
        for block in blocks
    ]


def laid_out(shapes: list[tuple[int, ...]], blocks: list[list[Block]], buckets: int = 1) -> list[Route]:
    """Put parameters into buckets of one rank; return the routes of their blocks, in the model's order."""
    group = cast(dist.ProcessGroup, dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=10)))
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    shares = {p: [Share(0, block) for block in cut] for p, cut in zip(parameters, blocks, strict=True)}
    size = -(-len(parameters) // buckets)
    for first in range(0, len(parameters), size):
        Bucket(parameters[first : first + size][::-1], shares, group)
    for index, parameter in enumerate(parameters):
        parameter.main_grad.copy_(torch.randn(parameter.shape) + index)  # type: ignore[attr-defined]
    return [entry for p, cut in zip(parameters, blocks, strict=True) for entry in routes_of(p, cut)]


def check_runs(routes: list[Route], runs: list[Run]) -> None:
    """The runs hold every piece once, in place, and are the model's memory."""
    weights = torch.stack([entry.block.matrix(entry.parameter.detach()) for entry in routes])
    gradients = torch.stack([entry.block.matrix(entry.parameter.main_grad) for entry in routes])  # type: ignore[attr-defined]
    found, found_gradients = torch.full_like(weights, torch.nan), torch.full_like(weights, torch.nan)
    for run in runs:
        assert run.of(found).isnan().all()
        run.of(found).copy_(run.weights)
        run.of(found_gradients).copy_(run.gradients)
    assert torch.equal(found, weights)
    assert torch.equal(found_gradients, gradients)
    for run in runs:
        run.weights.add_(1.0)
    after = torch.stack([entry.block.matrix(entry.parameter.detach()) for entry in routes])
    assert torch.equal(after, weights + 1.0)


WHOLE = Block(1, 0, 6, 0, 5)
GATE_UP = [Block(1, 0, 3, 0, 5), Block(1, 3, 3, 0, 5)]
# Rows of queries in each of two key-value groups, and what is theirs of keys and values.
KEYS_VALUES = [Block(2, 1, 1, 0, 5), Block(2, 2, 1, 0, 5)]
COLUMNS = Block(1, 0, 6, 1, 2)


@pytest.mark.parametrize(
    ("blocks", "buckets", "expected"),
    [
        ([WHOLE], 1, 1),
        ([WHOLE], 3, 3),
        # Each part of the parameters is regular by itself.
        (GATE_UP, 1, 2),
        (KEYS_VALUES, 1, 2),
        ([COLUMNS], 2, 2),
    ],
    ids=["whole", "buckets", "gate-up", "keys-values", "columns"],
)
@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_a_family_is_a_few_views_of_the_model(blocks: list[Block], buckets: int, expected: int, count: int) -> None:
    routes = laid_out([(6, 5)] * count, [blocks] * count, buckets)
    runs = runs_of(routes, [entry.block for entry in routes])
    assert len(runs) == min(expected, max(len(blocks), count))
    check_runs(routes, runs)


def test_vectors_and_other_shapes_between_do_not_cut_runs() -> None:
    """Gains and matrices alternate, in two sizes each; a family has one shape."""
    shapes: list[tuple[int, ...]] = [(4,), (6, 5), (7,), (3, 5)] * 10
    routes = laid_out(shapes, [[Block.whole(torch.empty(shape))] for shape in shapes])
    for kind in range(4):
        family = routes[kind::4]
        runs = runs_of(family, [entry.block for entry in family])
        assert len(runs) == 1
        check_runs(family, runs)


def test_blocks_of_one_shape_in_parameters_of_two() -> None:
    """The gate of one parameter is as large as another parameter: two regular runs, not many pairs."""
    shapes: list[tuple[int, ...]] = [(6, 5), (3, 5)] * 8
    blocks = [[Block(1, 0, 3, 0, 5)] for _ in shapes]
    routes = laid_out(shapes, blocks)
    runs = runs_of(routes, [entry.block for entry in routes])
    assert len(runs) == 2
    check_runs(routes, runs)


def test_pieces_in_no_regular_place_are_found_all_the_same() -> None:
    """A family that owns an irregular choice of what lies together, in another order."""
    routes = laid_out([(6, 5)] * 12, [[WHOLE]] * 12)
    family = [routes[index] for index in (7, 2, 3, 5, 11, 1, 0)]
    check_runs(family, runs_of(family, [entry.block for entry in family]))
