"""Where a tensor is in a torch_dist checkpoint: slabs, and the stored blocks that cover it.

In such a checkpoint the layers of a model are stacked: ``decoder.layers.mlp.linear_fc2.weight`` is [layers, d_out,
d_in], an expert's weight [layers, experts, d_out, d_in]. A *slab* is what one layer, or one expert of it, has of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAYERS, EXPERTS = "decoder.layers.", ".experts.experts."


def stacked_axes(key: str) -> int:
    """How many leading axes of a tensor count layers and experts."""
    if LAYERS not in key:
        return 0
    return 2 if EXPERTS in key else 1


@dataclass(frozen=True, slots=True, order=True)
class Slab:
    """A tensor of the model, or what one layer or expert has of it.

    Attributes:
        key: the tensor's name in the checkpoint.
        at: layer, and expert, if the tensor has such axes.
    """

    key: str
    at: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = "".join(f"[{index}]" for index in self.at)
        return f"{self.key}{place}"

    @property
    def position(self) -> tuple[bool, tuple[int, ...], str, tuple[int, ...]]:
        """Key that sorts slabs as a model has them: embedding, layer by layer, final norm and output."""
        last = not self.at and "embedding." not in self.key
        return last, self.at[:1], self.key, self.at


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored block of a tensor.

    Attributes:
        offsets: of its first element.
        sizes: its shape.
        file: its file in the checkpoint's folder.
        start: first byte there.
        length: bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def end(self) -> tuple[int, ...]:
        """Last index and 1, along each axis."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, low: tuple[int, ...], high: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return first and last+1 index of what the chunk and a range share; None if that is nothing."""
        starts = tuple(map(max, self.offsets, low))
        ends = tuple(map(min, self.end, high))
        return (starts, ends) if all(a < b for a, b in zip(starts, ends, strict=True)) else None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        shape: with the axes of layers and experts.
        dtype: of all its chunks.
        chunks: that cover it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
