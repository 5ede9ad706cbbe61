"""Blocks: parts of a rank's parameter that are owned, orthogonalized and saved by themselves."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from megatron_hyperp.parameters import Block

# [key-value groups of (2 query heads, key, value) with heads of 3 rows] x 7 columns.
FUSED = (4 * 4 * 3, 7)
QUERIES, KEYS, VALUES = Block(4, 0, 6, 0, 7), Block(4, 6, 3, 0, 7), Block(4, 9, 3, 0, 7)


def times_covered(shape: tuple[int, ...], blocks: Iterable[Block]) -> torch.Tensor:
    """How often each element of a tensor lies in one of the blocks."""
    times = torch.zeros(shape, dtype=torch.int64)
    for block in blocks:
        block.of(times).add_(1)
    return times


@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (6,), (1,)])
def test_the_whole_parameter_is_a_block_of_one_group(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    block = Block.whole(tensor)
    matrix = tensor if tensor.ndim == 2 else tensor[:, None]
    assert (block.groups, block.shape, block.numel) == (1, tuple(matrix.shape), tensor.numel())
    assert torch.equal(block.of(tensor), matrix[None])
    assert torch.equal(block.matrix(tensor), matrix)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 9, 20])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (1, 9), (9, 1), (10,), (1,)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_cut_tiles_the_parameter(shape: tuple[int, ...], dim: int, parts: int) -> None:
    """Equal pieces in order; the last may be smaller, and ranks beyond the last row or column get none."""
    whole = Block.whole(torch.empty(shape))
    pieces = whole.cut(dim, parts)
    assert bool((times_covered(shape, pieces) == 1).all())
    assert 1 <= len(pieces) <= parts
    lengths = [piece.shape[dim] for piece in pieces]
    assert set(lengths[:-1]) <= {-(-whole.shape[dim] // parts)}
    assert 0 < lengths[-1] <= lengths[0]
    assert {piece.shape[1 - dim] for piece in pieces} == {whole.shape[1 - dim]}
    tensor = torch.randn(shape)
    joined = torch.cat([piece.matrix(tensor) for piece in pieces], dim=dim)
    assert torch.equal(joined, whole.matrix(tensor))


@pytest.mark.parametrize(("length", "parts", "expected"), [(8, 4, [2] * 4), (7, 4, [2, 2, 2, 1]), (3, 8, [1] * 3)])
def test_the_sizes_of_a_cut(length: int, parts: int, expected: list[int]) -> None:
    assert [piece.rows for piece in Block.whole(torch.empty(length, 2)).cut(0, parts)] == expected
    assert [piece.columns for piece in Block.whole(torch.empty(2, length)).cut(1, parts)] == expected


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
def test_a_piece_can_be_cut_again(first: int, second: int, parts: int) -> None:
    pieces = [again for piece in Block.whole(torch.empty(11, 13)).cut(first, 3) for again in piece.cut(second, parts)]
    assert bool((times_covered((11, 13), pieces) == 1).all())


def test_components_of_a_fused_weight_tile_it() -> None:
    assert bool((times_covered(FUSED, (QUERIES, KEYS, VALUES)) == 1).all())


def test_a_block_with_groups_is_the_same_rows_of_each() -> None:
    tensor = torch.randn(FUSED)
    groups = tensor.view(4, 4, 3, 7)
    assert torch.equal(QUERIES.matrix(tensor), groups[:, :2].reshape(-1, 7))
    assert torch.equal(KEYS.matrix(tensor), groups[:, 2].reshape(-1, 7))
    assert torch.equal(VALUES.matrix(tensor), groups[:, 3].reshape(-1, 7))
    assert (QUERIES.shape, QUERIES.numel, KEYS.shape, KEYS.numel) == ((24, 7), 168, (12, 7), 84)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("dim", [0, 1])
def test_cut_components_tile_the_fused_weight(dim: int, parts: int) -> None:
    """Rows are cut within the groups, so that every piece is again the same rows of each."""
    pieces = [piece for block in (QUERIES, KEYS, VALUES) for piece in block.cut(dim, parts)]
    assert {piece.groups for piece in pieces} == {4}
    assert bool((times_covered(FUSED, pieces) == 1).all())


@pytest.mark.parametrize("block", [Block.whole(torch.empty(FUSED)), KEYS, Block(4, 7, 2, 3, 2)])
def test_a_block_is_a_view_that_writes_through(block: Block) -> None:
    tensor = torch.zeros(FUSED)
    view = block.of(tensor)
    assert view.shape == (block.groups, block.rows, block.columns)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    values = torch.randn(block.shape)
    view.copy_(values.view(view.shape))
    assert torch.equal(block.matrix(tensor), values)
    assert torch.equal(tensor != 0, times_covered(FUSED, [block]).bool())


def test_a_matrix_is_a_copy_only_where_its_groups_lie_apart() -> None:
    tensor = torch.randn(FUSED)
    home = tensor.untyped_storage().data_ptr()
    rows, columns = Block(1, 5, 3, 0, 7), Block(1, 0, 48, 2, 3)
    assert [block.matrix(tensor).untyped_storage().data_ptr() == home for block in (rows, columns, KEYS)] == [
        True,
        True,
        False,
    ]
