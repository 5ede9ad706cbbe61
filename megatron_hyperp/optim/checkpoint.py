"""Optimizer state in checkpoints that any layout can load.

A state tensor is saved under its weight's global shape, at the global offset of the block that it belongs to, whoever
owned that block: ownership decides who writes, and leaves no trace. Keys and global shapes are those of Megatron-Core's
own optimizer checkpoints (``optimizer.state.<name>.<weight>``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory

from megatron_hyperp.parameters import Block


def sharded_weights(
    model: ShardedStateDict, parameters: Iterable[torch.nn.Parameter]
) -> Mapping[torch.nn.Parameter, ShardedTensor | ShardedTensorFactory]:
    """Find the entry of each parameter in the model's sharded state dict.

    Raises:
        ValueError: a parameter has none.
    """
    by_id = {id(entry.data): entry for entry in nested_values(model) if hasattr(entry, "data")}
    found = {}
    for parameter in parameters:
        if id(parameter) not in by_id:
            raise ValueError(f"the model's sharded state dict lacks a parameter of shape {tuple(parameter.shape)}")
        found[parameter] = by_id[id(parameter)]
    return found


def sharded_state(
    weight: ShardedTensor | ShardedTensorFactory,
    block: Block,
    state: torch.Tensor,
    name: str,
    *,
    by_row: bool = False,
) -> list[ShardedTensor]:
    """Describe the state of one block of a weight.

    Args:
        weight: the whole local weight's entry in the model's sharded state dict.
        block: the part of it that the state belongs to.
        state: [rows, columns] of the block, or [rows, 1] for one number for each row.
        name: of the state, such as "exp_avg".
        by_row: whether it has one number for each row.

    Returns:
        One sharded tensor, a view of ``state``, for each run of rows that is contiguous in the global weight.
    """
    grouped = state.view(block.groups, block.rows, -1)
    rows_per_group = _rows(weight) // block.groups
    result = []
    for first_row, part in _row_ranges(weight):
        for group in range(block.groups):
            start = group * rows_per_group + block.start
            low = max(start, first_row)
            high = min(start + block.rows, first_row + part.local_shape[0])
            if low < high:
                taken = grouped[group, low - start : high - start]
                result.append(_entry(part, low - first_row, block.column, taken, name, by_row))
    return result


def _rows(weight: ShardedTensor | ShardedTensorFactory) -> int:
    return int(weight.data.shape[0])


def _row_ranges(weight: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """Return first local row and description of the parts that a weight is saved in: gate and up rows lie apart."""
    if isinstance(weight, ShardedTensor):
        return [(0, weight)]
    first, ranges = 0, []
    for part in nested_values(weight.build()):
        ranges.append((first, part))
        first += part.local_shape[0]
    return ranges


def _entry(part: ShardedTensor, row: int, column: int, state: torch.Tensor, name: str, by_row: bool) -> ShardedTensor:
    """Describe [rows, columns] of state that begin at a row and column of ``part``, or [rows, 1] if ``by_row``."""
    # Layers that are stacked in one global tensor have leading axes of size 1 here.
    prepended, inner = part.prepend_axis_num, part.local_shape[1:]
    shape, offset = list(part.global_shape), list(part.global_offset)
    offset[prepended] += row
    replica = 0
    if len(inner) == 1:
        offset[-1] += column
    if by_row and inner:
        # One number for each row: ranks, or blocks, that split the columns all have it, and the first one saves it.
        replica = int(any(offset[prepended + 1 :]))
        shape[prepended + 1 :] = [1] * len(inner)
        offset[prepended + 1 :] = [0] * len(inner)
        inner = (1,) * len(inner)
    elif len(inner) == 1:
        inner = (state.shape[1],)
    data = state.view((1,) * prepended + (len(state), *inner))
    return ShardedTensor(
        key=f"optimizer.state.{name}.{part.key}",
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        # Blocks of unequal size are no regular grid.
        axis_fragmentations=None,
        # The last number counts data-parallel replicas, of which there are none: a block has one owner.
        replica_id=(*part.replica_id[:-1], replica) if isinstance(part.replica_id, tuple) else replica,
    )
