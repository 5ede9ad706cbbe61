"""State of optimizer blocks in checkpoints: put together from all ranks it is the global tensor, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_hyperp.model.init import _shard
from megatron_hyperp.optim.checkpoint import sharded_state, sharded_weights
from megatron_hyperp.parameters import Block

# A layer of so many, where layers are stacked along a leading axis of the saved tensor.
LAYER, LAYERS = 2, 3
# Data-parallel replica that describes the model's weights: it must leave no trace in the state's.
REPLICA = 5
TENSOR_PARALLEL = (1, 2, 4)
GROUPS, HEAD = 4, 3


def whole_tensor(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def described(shard: torch.Tensor, dim: int, rank: int, ranks: int, *, stacked: bool) -> ShardedTensor:
    """Describe a tensor-parallel rank's shard as Megatron-Core does, with layers stacked or as keys of their own."""
    layers = ((0, LAYER, LAYERS),) if stacked else ()
    return ShardedTensor.from_rank_offsets(
        "weight",
        shard,
        *layers,
        (dim + len(layers), rank, ranks),
        replica_id=(0, 0, REPLICA),
        prepend_axis_num=len(layers),
    )


def assemble(entries: Iterable[ShardedTensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Write every entry into the global tensor; NaN where none did. Nothing is written twice."""
    whole = torch.full(shape, torch.nan)
    for entry in entries:
        place = entry.global_slice()
        assert entry.global_shape == shape
        assert bool(whole[place].isnan().all())
        whole[place] = entry.data
    return whole


def cut(block: Block, dim: int | None, owners: int) -> list[Block]:
    return [block] if dim is None else block.cut(dim, owners)


CUTS = [(None, 1), (0, 2), (0, 3), (0, 7), (1, 2), (1, 3)]


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("cut_dim", "owners"), CUTS)
def test_pieces_make_up_a_matrix(ranks: int, stacked: bool, dim: int, cut_dim: int | None, owners: int) -> None:
    whole = whole_tensor(8, 12)
    entries: list[ShardedTensor] = []
    for rank in range(ranks):
        shard = whole.chunk(ranks, dim=dim)[rank].contiguous()
        weight = described(shard, dim, rank, ranks, stacked=stacked)
        for block in cut(Block.whole(shard), cut_dim, owners):
            (entry,) = sharded_state(weight, block, block.matrix(shard), "master")
            entries.append(entry)
    assert {entry.key for entry in entries} == {"optimizer.state.master.weight"}
    assert all(is_main_replica(entry.replica_id) for entry in entries)
    if stacked:
        saved = assemble(entries, (LAYERS, 8, 12))
        assert bool(saved[[layer for layer in range(LAYERS) if layer != LAYER]].isnan().all())
        assert torch.equal(saved[LAYER], whole)
    else:
        assert torch.equal(assemble(entries, (8, 12)), whole)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("cut_dim", "owners"), CUTS)
@pytest.mark.parametrize("split", [False, True])
def test_pieces_make_up_gate_and_up(ranks: int, stacked: bool, cut_dim: int | None, owners: int, split: bool) -> None:
    """A rank's rows, some of the gate's and then some of the up's, lie apart in the saved tensor."""
    whole = whole_tensor(24, 6)
    entries: list[ShardedTensor] = []
    for rank in range(ranks):
        shard = _shard("linear_fc1.weight", whole, 0, rank, ranks).contiguous()
        layers = ((0, LAYER, LAYERS),) if stacked else ()
        factory = apply_swiglu_sharded_factory(described(shard, 0, rank, ranks, stacked=stacked), layers)
        assert isinstance(factory, ShardedTensorFactory)
        for part in Block.whole(shard).cut(0, 2) if split else [Block.whole(shard)]:
            for block in cut(part, cut_dim, owners):
                found = sharded_state(factory, block, block.matrix(shard), "exp_avg")
                spans_both = block.start < len(shard) // 2 < block.start + block.rows
                assert len(found) == (2 if spans_both else 1)
                entries += found
    assert {entry.key for entry in entries} == {"optimizer.state.exp_avg.weight"}
    assert all(is_main_replica(entry.replica_id) for entry in entries)
    saved = assemble(entries, (LAYERS, 24, 6) if stacked else (24, 6))
    assert torch.equal(saved[LAYER] if stacked else saved, whole)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("cut_dim", "owners"), CUTS)
def test_pieces_of_components_make_up_qkv(ranks: int, stacked: bool, cut_dim: int | None, owners: int) -> None:
    """A component's rows come in one run for each key-value group."""
    whole = whole_tensor(GROUPS * 4 * HEAD, 6)
    entries: list[ShardedTensor] = []
    for rank in range(ranks):
        shard, groups = whole.chunk(ranks)[rank], GROUPS // ranks
        weight = described(shard, 0, rank, ranks, stacked=stacked)
        queries = Block(groups, 0, 2 * HEAD, 0, 6)
        keys, values = (Block(groups, first * HEAD, HEAD, 0, 6) for first in (2, 3))
        for component in (queries, keys, values):
            for block in cut(component, cut_dim, owners):
                found = sharded_state(weight, block, block.matrix(shard), "momentum_buffer")
                assert len(found) == groups
                entries += found
    assert all(is_main_replica(entry.replica_id) for entry in entries)
    shape = tuple(whole.shape)
    saved = assemble(entries, (LAYERS, *shape) if stacked else shape)
    assert torch.equal(saved[LAYER] if stacked else saved, whole)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("owners", [1, 2, 3, 20])
def test_pieces_make_up_a_vector(ranks: int, stacked: bool, owners: int) -> None:
    """State of a vector is a column, and a vector when it is saved."""
    whole = whole_tensor(20)
    entries: list[ShardedTensor] = []
    for rank in range(ranks):
        shard = whole.chunk(ranks)[rank]
        weight = described(shard, 0, rank, ranks, stacked=stacked)
        for block in Block.whole(shard).cut(0, owners):
            entries += sharded_state(weight, block, block.matrix(shard), "exp_avg_sq")
    saved = assemble(entries, (LAYERS, 20) if stacked else (20,))
    assert torch.equal(saved[LAYER] if stacked else saved, whole)


def both_kinds(shard: torch.Tensor) -> list[ShardedTensor | ShardedTensorFactory]:
    weight = described(shard, 0, 1, 2, stacked=True)
    return [weight, apply_swiglu_sharded_factory(weight, ((0, LAYER, LAYERS),))]


@pytest.mark.parametrize("block", [Block(1, 0, 24, 0, 4), Block(1, 10, 9, 1, 2), Block(4, 1, 4, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_reaches_the_state(block: Block, dtype: torch.dtype) -> None:
    """Entries are views of the state in its own dtype, in the order of its rows: one below the other they are it."""
    for weight in both_kinds(torch.zeros(24, 4)):
        state = torch.randn(block.shape).to(dtype)
        entries = sharded_state(weight, block, state, "momentum_buffer")
        assert {entry.dtype for entry in entries} == {dtype}
        assert torch.equal(torch.cat([entry.data.reshape(-1, block.columns) for entry in entries]), state)
        for entry in entries:
            entry.data.zero_()
        assert not state.any()


@pytest.mark.parametrize(("replica", "expected"), [((0, 2, REPLICA), (0, 2, 0)), ((1, 0, 0), (1, 0, 0)), (REPLICA, 0)])
def test_only_data_parallel_replicas_vanish(replica: tuple[int, ...] | int, expected: tuple[int, ...] | int) -> None:
    """Copies on other tensor-parallel ranks, or at the other end of the pipeline, stay copies."""
    shard = torch.zeros(6)
    weight = ShardedTensor.from_rank_offsets("norm.weight", shard, replica_id=replica)
    (entry,) = sharded_state(weight, Block.whole(shard), shard[:, None], "master")
    assert entry.replica_id == expected


def test_weights_are_found_by_identity() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4, 2)) for _ in range(3)]
    plain, stacked, gated = (described(parameter, 0, 0, 1, stacked=False) for parameter in parameters)
    factory = apply_swiglu_sharded_factory(gated, ())
    model = {"model0": {"a": plain, "extra": torch.zeros(4, 2)}, "model1": {"layers": [{"b": stacked}, {"c": factory}]}}
    found = sharded_weights(model, parameters)
    assert [found[parameter] for parameter in parameters] == [plain, stacked, factory]


def test_a_parameter_that_the_model_does_not_save_is_an_error() -> None:
    known, unknown = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(7, 3))
    model = {"weight": described(known, 0, 0, 1, stacked=False)}
    with pytest.raises(ValueError, match=r"sharded state dict lacks a parameter of shape \(7, 3\)"):
        sharded_weights(model, [known, unknown])
