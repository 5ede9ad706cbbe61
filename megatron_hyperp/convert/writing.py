"""Write a torch_dist checkpoint tensor by tensor, each asked for when its turn comes, cut for any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_hyperp.convert.slabs import LAYERS, Slab
from megatron_hyperp.convert.storage import FORMAT
from megatron_hyperp.errors import UsageError
from megatron_hyperp.megatron_compat.checkpoints import COMMON_FILE, FORMAT_FILE

# torch's writer keeps the last tensor of each name until its file is closed: files are closed after so many bytes.
FILE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks that a checkpoint is cut for: each reads whole chunks. Any other layout reads parts of them.

    Attributes:
        tp: tensor-parallel ranks.
        pp: pipeline stages; each has files of its own.
        ep: expert-parallel ranks. Experts are chunks by themselves, so that this only says what must divide them.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def check(self, *, layers: int, experts: int, split: dict[str, int]) -> None:
        """Refuse sizes that do not divide the model.

        Args:
            layers: of the model.
            experts: routed experts of a layer; 0 for a dense model.
            split: sizes that tensor-parallel ranks share, by name.

        Raises:
            UsageError: one of them does not; or expert parallelism without experts.
        """
        for flag, size in (("--tp", self.tp), ("--pp", self.pp), ("--ep", self.ep)):
            if size < 1:
                raise UsageError(f"{flag} is {size}; it must be 1 or more")
        for name, size in split.items():
            if size % self.tp:
                raise UsageError(f"--tp {self.tp} does not divide the {name}, {size}; give a number that does")
        if layers % self.pp:
            raise UsageError(f"--pp {self.pp} does not divide the {layers} layers; give a number that does")
        if self.ep > 1 and (not experts or experts % self.ep):
            what = f"does not divide the {experts} experts" if experts else "needs experts, and there are none"
            raise UsageError(f"--ep {self.ep} {what}; give a number that does, or 1")


@dataclass(frozen=True, slots=True)
class Item:
    """A slab to write.

    Attributes:
        slab: its name and place.
        shape: without the axes of layers and experts.
        dtype: of what :attr:`read` returns.
        read: returns it; called once.
    """

    slab: Slab
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cuts(key: str, shape: Sequence[int], tp: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offsets and sizes of the blocks of a slab that tensor-parallel ranks hold.

    Gate and up rows lie apart: a rank holds its share of either. An expert is whole on its rank.

    Args:
        key: of a weight, or of its optimizer state.
        shape: of the slab.
        tp: ranks.
    """
    dim, parts = 0, 1
    if ".experts." in key or tp == 1:
        parts = 2 if key.endswith("linear_fc1.weight") else 1
    elif key.endswith("linear_fc1.weight"):
        parts = 2 * tp
    elif key.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        parts = tp
    elif key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        dim, parts = 1, tp
    size = shape[dim] // parts
    assert size * parts == shape[dim], (key, shape, tp)
    sizes = tuple(size if axis == dim else length for axis, length in enumerate(shape))
    starts = [tuple(index * size if axis == dim else 0 for axis in range(len(shape))) for index in range(parts)]
    return [(start, sizes) for start in starts]


def write_checkpoint(
    folder: Path,
    items: Iterable[Item],
    common: dict[str, Any],
    *,
    layout: Layout,
    advance: Callable[[int], None],
) -> None:
    """Write tensors and common state into a folder that is there.

    Args:
        folder: of the iteration.
        items: every slab of every tensor.
        common: what all ranks share.
        layout: that the tensors are cut for.
        advance: told the bytes of each slab that is written.

    Raises:
        UsageError: a tensor lacks one of its layers or experts.
    """
    items = list(items)
    stacks = _stacks(items)
    writer = FileSystemWriter(folder)
    layers = max((counts[0] for counts in stacks.values() if counts), default=1)
    files = list(_files(items, layers // layout.pp))
    writer.set_up_storage_writer(True)
    plans = [SavePlan([entry for item in file for entry in _entries(item, stacks, layout.tp)]) for file in files]
    results = []
    for plan, file in zip(writer.prepare_global_plan(plans), files, strict=True):
        written = writer.write_data(plan, _Puller(file, stacks, advance))
        results.append(written.wait())
    writer.finish(_metadata(plans), results)
    torch.save(common, folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))


def _stacks(items: Sequence[Item]) -> dict[str, tuple[int, ...]]:
    """Return how many layers and experts each tensor has."""
    places: dict[str, set[tuple[int, ...]]] = {}
    for item in items:
        places.setdefault(item.slab.key, set()).add(item.slab.at)
    counts = {key: tuple(max(axis) + 1 for axis in zip(*at, strict=True)) for key, at in places.items()}
    for key, at in places.items():
        whole = torch.Size(counts[key]).numel()
        if len(at) != whole:
            raise UsageError(
                f"{key} has {len(at)} of {whole} layers and experts; what lacks the others cannot be stacked:"
                " the source is not whole"
            )
    return counts


def _files(items: Sequence[Item], layers_per_stage: int) -> Iterator[list[Item]]:
    """Group slabs into files: a pipeline stage begins a new one, and so do many bytes."""
    file: list[Item] = []
    stage, size = 0, 0
    for item in items:
        where = item.slab.at[0] // layers_per_stage if LAYERS in item.slab.key else stage
        if file and (where != stage or size + item.nbytes > FILE_BYTES):
            yield file
            file, size = [], 0
        stage = where
        file.append(item)
        size += item.nbytes
    if file:
        yield file


def _entries(item: Item, stacks: dict[str, tuple[int, ...]], tp: int) -> Iterator[WriteItem]:
    slab, ones = item.slab, (1,) * len(item.slab.at)
    for start, sizes in cuts(slab.key, item.shape, tp):
        offsets = torch.Size((*slab.at, *start))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size((*ones, *sizes))),
            properties=TensorProperties(dtype=item.dtype),
            size=torch.Size((*stacks[slab.key], *item.shape)),
        )
        yield WriteItem(MetadataIndex(slab.key, offsets), WriteItemType.SHARD, tensor_data=data)


def _metadata(plans: Sequence[SavePlan]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for plan in plans:
        for entry in plan.items:
            assert entry.tensor_data is not None
            data = entry.tensor_data
            kept = tensors.setdefault(entry.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            assert isinstance(kept, TensorStorageMetadata)
            kept.chunks.append(data.chunk)
    return Metadata(tensors)


class _Puller(DefaultSavePlanner):
    """Answers torch's writer: reads a slab when its first chunk is due, and keeps it until its last."""

    def __init__(
        self, items: Sequence[Item], stacks: dict[str, tuple[int, ...]], advance: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._items = {item.slab: item for item in items}
        self._stacks, self._advance = stacks, advance
        self._held: tuple[Slab, torch.Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return a chunk, in memory of its own."""
        assert write_item.tensor_data is not None
        key, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        axes = len(self._stacks[key])
        slab = Slab(key, tuple(chunk.offsets[:axes]))
        if self._held is None or self._held[0] != slab:
            self._held = None
            item = self._items[slab]
            self._held = (slab, item.read())
            self._advance(item.nbytes)
            assert self._held[1].shape == item.shape
            assert self._held[1].dtype == item.dtype
        block = self._held[1]
        for dim, (start, size) in enumerate(zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True)):
            block = block.narrow(dim, start, size)
        block = block.view(chunk.sizes) if block.is_contiguous() else block.reshape(chunk.sizes)
        # torch.save writes all memory that a view looks at.
        return block if block.numel() * block.itemsize == block.untyped_storage().nbytes() else block.clone()
