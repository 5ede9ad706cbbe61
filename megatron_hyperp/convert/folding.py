"""Multipliers folded into weights, and taken out again to the bit.

y = x m is rounded, so y / m is x only up to an ulp or two. The difference of the two as integers, one byte an element,
is kept beside the weights; with it x comes back exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_hyperp.errors import UsageError

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Elements at a time, so that intermediate tensors stay small.
_BLOCK = 2**22


def fold_(weights: torch.Tensor, factor: float, *, undo: bool, name: str = "a weight") -> torch.Tensor | None:
    """Multiply in place.

    Args:
        weights: contiguous, of a floating dtype.
        factor: to multiply by.
        undo: whether the corrections are wanted, without which a division undoes it only nearly.
        name: of the weights, in errors.

    Returns:
        int8 corrections of the shape of ``weights``; None if they are not wanted, or the factor is 1.

    Raises:
        UsageError: a number is so large that the product overflows, and no correction brings it back.
    """
    if factor == 1.0:
        return None
    corrections = None
    if undo:
        corrections = torch.empty(weights.shape, dtype=torch.int8)
    flat = weights.view(-1)
    kind = _INTEGERS[weights.dtype]
    for block in _blocks(flat):
        before = flat[block].clone()
        flat[block] = _multiplied(before, factor)
        if corrections is not None:
            difference = before.view(kind) - _divided(flat[block], factor).view(kind)
            if difference.abs().max() > 127:
                raise UsageError(
                    f"{name} holds numbers that overflow or are not finite when multiplied by {factor:g}, so that"
                    " the way back would not be exact; mend the weights first"
                )
            corrections.view(-1)[block] = difference.to(torch.int8)
    return corrections


def unfold_(weights: torch.Tensor, factor: float, corrections: torch.Tensor | None = None) -> None:
    """Divide in place, and add the corrections: undoes :func:`fold_`."""
    if factor == 1.0:
        return
    flat, kind = weights.view(-1), _INTEGERS[weights.dtype]
    for block in _blocks(flat):
        flat[block] = _divided(flat[block], factor)
        if corrections is not None:
            flat[block].view(kind).add_(corrections.view(-1)[block])


def _blocks(flat: torch.Tensor) -> Iterator[slice]:
    for start in range(0, flat.numel(), _BLOCK):
        yield slice(start, start + _BLOCK)


def _multiplied(weights: torch.Tensor, factor: float) -> torch.Tensor:
    """In fp32, rounded once."""
    return (weights.float() * factor).to(weights.dtype)


def _divided(weights: torch.Tensor, factor: float) -> torch.Tensor:
    return (weights.float() / factor).to(weights.dtype)
