"""--matrix-split: which rows of fused weights are a matrix of their own, the same ones for every tensor parallelism."""

from __future__ import annotations

import math
import re

import pytest
import torch

from megatron_hyperp.model.init import _shard
from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.routing import Heads, Route, describe, route
from megatron_hyperp.parameters import DISTINCT, REPLICATED

QKV, PROJ = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.self_attention.linear_proj.weight"
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
GROUPS, HEADS, WIDTH, FFN = 4, Heads(size=3, queries=2), 5, 8
SHAPES = {QKV: (GROUPS * (HEADS.queries + 2) * HEADS.size, WIDTH), FC1: (2 * FFN, WIDTH)}
TENSOR_PARALLEL = (1, 2, 4)


def shard(name: str, whole: torch.Tensor, rank: int, ranks: int, *, dim: int = 0) -> torch.nn.Parameter:
    """A tensor-parallel rank's part, as the model lays it out."""
    result = torch.nn.Parameter(_shard(name, whole, dim, rank, ranks).clone())
    result.tensor_model_parallel, result.partition_dim = True, dim  # type: ignore[attr-defined]
    return result


def numbered(name: str) -> torch.Tensor:
    rows, columns = SHAPES[name]
    return torch.arange(1.0, 1.0 + rows * columns).view(rows, columns)


def routes_of(
    name: str, parameter: torch.nn.Parameter, ranks: int, split: str, optimizer: str = "hyperp"
) -> list[Route]:
    options = HyperPConfig(lr=1.0, optimizer=optimizer, matrix_split=split)  # type: ignore[arg-type]
    return route([(name, parameter)], options, tensor_parallel_size=ranks, heads=HEADS)


def matrices(entries: list[Route]) -> dict[str, torch.Tensor]:
    return {entry.name: entry.block.matrix(entry.parameter.detach()) for entry in entries}


def sharded_routes(name: str, ranks: int, split: str) -> list[list[Route]]:
    whole = numbered(name)
    return [routes_of(name, shard(name, whole, rank, ranks), ranks, split) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("split", ["component", "head"])
@pytest.mark.parametrize("name", [QKV, FC1])
def test_the_parts_tile_every_shard(name: str, split: str, ranks: int) -> None:
    for entries in sharded_routes(name, ranks, split):
        assert len(entries) > 1
        times = torch.zeros_like(entries[0].parameter, requires_grad=False)
        for entry in entries:
            entry.block.of(times).add_(1)
        assert bool((times == 1).all())


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
def test_components_of_qkv_are_those_of_the_whole_weight(ranks: int) -> None:
    """Gathered over the ranks, each is the rows of all its heads, in order."""
    groups = numbered(QKV).view(GROUPS, HEADS.queries + 2, HEADS.size, WIDTH)
    expected = {
        f"{QKV}[q]": groups[:, : HEADS.queries].reshape(-1, WIDTH),
        f"{QKV}[k]": groups[:, HEADS.queries].reshape(-1, WIDTH),
        f"{QKV}[v]": groups[:, HEADS.queries + 1].reshape(-1, WIDTH),
    }
    shards = sharded_routes(QKV, ranks, "component")
    assert [entry.name for entry in shards[0]] == list(expected)
    for index, (name, whole) in enumerate(expected.items()):
        assert torch.equal(torch.cat([matrices(entries)[name] for entries in shards]), whole)
        for entry in (entries[index] for entries in shards):
            assert (entry.shape, entry.partition_dim) == (tuple(whole.shape), 0)
            assert entry.radius == math.sqrt(len(whole) / 3)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
def test_heads_of_qkv_are_those_of_the_whole_weight(ranks: int) -> None:
    """Each is whole on one rank, and each rank has its own."""
    expected = numbered(QKV).view(-1, HEADS.size, WIDTH)
    shards = sharded_routes(QKV, ranks, "head")
    assert [entry.name for entry in shards[0]] == [f"{QKV}[head {index}]" for index in range(len(expected) // ranks)]
    assert torch.equal(torch.stack([head for entries in shards for head in matrices(entries).values()]), expected)
    for entry in (entry for entries in shards for entry in entries):
        assert (entry.shape, entry.partition_dim) == ((HEADS.size, WIDTH), DISTINCT)
        assert entry.radius == math.sqrt(HEADS.size / 3)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("split", ["component", "head"])
def test_gate_and_up_are_those_of_the_whole_weight(split: str, ranks: int) -> None:
    gate, up = numbered(FC1).chunk(2)
    shards = sharded_routes(FC1, ranks, split)
    assert [entry.name for entry in shards[0]] == [f"{FC1}[gate]", f"{FC1}[up]"]
    for index, whole in enumerate((gate, up)):
        assert torch.equal(torch.cat([list(matrices(entries).values())[index] for entries in shards]), whole)
        for entry in (entries[index] for entries in shards):
            assert (entry.shape, entry.partition_dim) == ((FFN, WIDTH), 0)
            assert entry.radius == math.sqrt(FFN / 3)


def test_parts_of_a_weight_that_is_not_sharded_are_not_either() -> None:
    for name, split in ((QKV, "component"), (QKV, "head"), (FC1, "head")):
        parameter = torch.nn.Parameter(numbered(name))
        for entry in routes_of(name, parameter, 2, split):
            assert (entry.shape, entry.partition_dim) == (entry.block.shape, REPLICATED)


@pytest.mark.parametrize("split", ["fused", "component", "head"])
def test_other_matrices_stay_whole(split: str) -> None:
    for name, whole in ((PROJ, torch.ones(WIDTH, 8)), (FC2, torch.ones(WIDTH, FFN))):
        (entry,) = routes_of(name, shard(name, whole, 1, 2, dim=1), 2, split)
        assert (entry.name, entry.shape, entry.partition_dim) == (name, tuple(whole.shape), 1)
        assert entry.radius == math.sqrt(WIDTH / 3)


@pytest.mark.parametrize("name", [QKV, FC1])
def test_fused_weights_are_one_matrix_by_default(name: str) -> None:
    parameter = shard(name, numbered(name), 0, 2)
    (entry,) = route([(name, parameter)], HyperPConfig(lr=1.0), tensor_parallel_size=2)
    assert (entry.name, entry.shape, entry.partition_dim) == (name, SHAPES[name], 0)
    assert entry.radius == math.sqrt(SHAPES[name][0] / 3)
    assert torch.equal(entry.block.matrix(parameter), parameter)


@pytest.mark.parametrize("split", ["component", "head"])
def test_only_what_is_orthogonalized_is_split(split: str) -> None:
    for name in (QKV, FC1):
        parameter = shard(name, numbered(name), 0, 1)
        (entry,) = routes_of(name, parameter, 1, split, optimizer="adamw")
        assert (entry.name, entry.rule.name, entry.shape, entry.radius) == (name, "adamw", SHAPES[name], None)
        split_by_muon = routes_of(name, parameter, 1, split, optimizer="muon")
        assert [entry.shape for entry in split_by_muon] == [
            entry.shape for entry in routes_of(name, parameter, 1, split)
        ]
        assert {(entry.rule.name, entry.radius) for entry in split_by_muon} == {("muon", None)}


PARTS = {
    "fused": {"qkv.weight": ("48 x 5", 3), "fc1.weight": ("16 x 5", 3)},
    "component": {
        "qkv.weight[q]": ("24 x 5", 3),
        "qkv.weight[k]": ("12 x 5", 3),
        "qkv.weight[v]": ("12 x 5", 3),
        "fc1.weight[gate]": ("8 x 5", 3),
        "fc1.weight[up]": ("8 x 5", 3),
    },
    "head": {
        "qkv.weight[head *]": ("3 x 5", 3 * 16),
        "fc1.weight[gate]": ("8 x 5", 3),
        "fc1.weight[up]": ("8 x 5", 3),
    },
}


@pytest.mark.parametrize("split", PARTS)
def test_the_table_lists_every_part_of_every_parameter(split: str) -> None:
    """Those of three layers on one line, with their count at its end."""
    pairs = [
        (name.replace("layers.0", f"layers.{layer}"), torch.nn.Parameter(torch.ones(shape)))
        for layer in range(3)
        for name, shape in {**SHAPES, PROJ: (WIDTH, 24), FC2: (WIDTH, FFN)}.items()
    ]
    entries = route(pairs, HyperPConfig(lr=1.0, matrix_split=split), tensor_parallel_size=1, heads=HEADS)  # type: ignore[arg-type]
    found = {}
    for line in describe(entries).splitlines()[1:]:
        name, _, shape, *_, count = re.split(r"  +", line)
        found[name.split("linear_")[1]] = (shape, int(count))
    assert found == {**PARTS[split], "proj.weight": ("5 x 24", 3), "fc2.weight": ("5 x 8", 3)}
