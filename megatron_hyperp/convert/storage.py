"""Read a torch_dist checkpoint tensor by tensor: one process, no process group, one slab in memory."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp.arguments import shown
from megatron_hyperp.convert.slabs import Chunk, Slab, Stored, stacked_axes
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import holds, read_json
from megatron_hyperp.megatron_compat.checkpoints import (
    BACKEND,
    BACKEND_VERSION,
    COMMON_FILE,
    COMMON_OBJECT,
    FORMAT_FILE,
    METADATA_FILE,
)
from megatron_hyperp.megatron_compat.versions import SUPPORTED
from megatron_hyperp.pickles import check_archive, load_metadata, load_values, read_values

OPTIMIZER_STATE = "optimizer.state."
# Content of metadata.json that Megatron-Core's reader requires; from 0.19 on the first two entries alone.
FORMAT = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": BACKEND_VERSION,
    "common_backend": "torch",
    "common_backend_version": 1,
}


# Along a dimension of a tensor without elements.
_LARGEST_EMPTY = 10**6


class _Window(io.RawIOBase):
    """A range of a file as a file: ``torch.load`` reads from it straight into the tensor's memory."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view[: max(0, self._length - self._at)])
        self._at += count
        return count


class CheckpointReader:
    """A checkpoint in Megatron-Core's torch_dist format.

    Nothing but the metadata is read until a tensor is asked for. torch's own reader takes a second copy of each chunk
    that it reads; here a chunk that is the whole slab is handed out as it is.

    Args:
        folder: of one iteration.
        allowed: classes that the common state may hold besides plain values.

    Raises:
        UsageError: the folder is no such checkpoint, is damaged, or has code objects in its metadata.
    """

    def __init__(self, folder: str | Path, *, allowed: tuple[Any, ...] = ()) -> None:
        self.folder = Path(folder)
        self._allowed = allowed
        check_format(self.folder)
        metadata = load_metadata(self.folder / METADATA_FILE)
        self.tensors: dict[str, Stored] = {}
        self.objects: dict[str, Chunk] = {}
        try:
            self._read_index(metadata)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise self._damaged(f"its {METADATA_FILE} is not whole ({type(error).__name__}: {error})") from error

    def _read_index(self, metadata: Any) -> None:
        places = {
            (index.fqn, tuple(index.offset or ())): (info.relative_path, info.offset, info.length)
            for index, info in metadata.storage_data.items()
        }
        sizes = {}
        for file in sorted({place[0] for place in places.values()}):
            # A name from a file of others must not lead out of the folder.
            if Path(file).name != file:
                raise self._damaged(f"its {METADATA_FILE} names the file {file}, outside of it")
            if not holds(self.folder, file):
                raise self._damaged(f"{file} is missing")
            sizes[file] = (self.folder / file).stat().st_size
        for key, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                self.objects[key] = Chunk((), (), *places[key, ()])
                continue
            chunks = tuple(
                Chunk(_counts(chunk.offsets), _counts(chunk.sizes), *places[key, tuple(chunk.offsets)])
                for chunk in entry.chunks
            )
            self.tensors[key] = Stored(_counts(entry.size), entry.properties.dtype, chunks)
            self._check(key, self.tensors[key], sizes)

    def _check(self, key: str, stored: Stored, sizes: dict[str, int]) -> None:
        """See that files are as large as what is said to be in them, before memory is taken for it."""
        if not isinstance(key, str) or not isinstance(stored.dtype, torch.dtype):
            raise TypeError(f"{shown(key)} is no tensor")
        room = 0
        for chunk in stored.chunks:
            start, length = _counts((chunk.start, chunk.length))
            if len(chunk.offsets) != len(stored.shape) or len(chunk.sizes) != len(stored.shape):
                raise ValueError(f"a chunk of {key} has other dimensions")
            if start + length > sizes[chunk.file] or math.prod(chunk.sizes) * stored.dtype.itemsize > length:
                raise self._damaged(f"{chunk.file} is too short for {key}")
            room += math.prod(chunk.sizes)
        if math.prod(stored.shape) > room or (0 in stored.shape and max(stored.shape) > _LARGEST_EMPTY):
            raise self._damaged(f"the chunks of {key} do not cover it")

    def _damaged(self, reason: str) -> UsageError:
        return damaged(self.folder, reason)

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all ranks share: progress, settings, counts; tensors and plain values only."""
        if (self.folder / COMMON_FILE).is_file():
            values = load_values(self.folder / COMMON_FILE, allowed=self._allowed)
        elif COMMON_OBJECT in self.objects:
            values = self._common_object()
        else:
            raise UsageError(
                f"{self.folder} has its common state neither in {COMMON_FILE}, as megatron-core 0.16 to 0.18 writes it,"
                f" nor as the object {COMMON_OBJECT}, as 0.19 does; it is of another version, or not whole: save it"
                " again with one of these"
            )
        if not isinstance(values, dict):
            raise self._damaged("its common state holds no names with values")
        return values

    def _common_object(self) -> Any:
        chunk = self.objects[COMMON_OBJECT]
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                window = io.BufferedReader(_Window(file, chunk.start, chunk.length))
                values = read_values(window, path, allowed=self._allowed)
        except OSError as error:
            raise self._damaged(f"{chunk.file} cannot be read ({error.strerror})") from error
        if not isinstance(values, list) or len(values) != 1:
            raise self._damaged(f"{COMMON_OBJECT} holds something else than one shard")
        return values[0]

    def slabs(self, prefix: str = "") -> Iterator[Slab]:
        """Yield every slab of the tensors whose names begin so: embedding, layer by layer, final norm and output."""
        found = []
        for key, stored in self.tensors.items():
            if key.startswith(prefix):
                counts = stored.shape[: stacked_axes(key)]
                found += [Slab(key, place) for place in itertools.product(*map(range, counts))]
        yield from sorted(found, key=lambda slab: slab.position)

    def weights(self) -> Iterator[Slab]:
        """Yield the slabs of the model's weights, without the optimizer's state."""
        yield from (slab for slab in self.slabs() if not slab.key.startswith(OPTIMIZER_STATE))

    def shape(self, slab: Slab) -> tuple[int, ...]:
        """Return the shape of a slab, without the axes of layers and experts."""
        return self._stored(slab).shape[len(slab.at) :]

    def dtype(self, slab: Slab) -> torch.dtype:
        """Return the dtype in which a slab is stored."""
        return self._stored(slab).dtype

    def _stored(self, slab: Slab) -> Stored:
        if slab.key not in self.tensors:
            raise UsageError(f"the checkpoint {self.folder} lacks {slab.key}; it is of another architecture")
        return self.tensors[slab.key]

    def read(self, slab: Slab) -> torch.Tensor:
        """Read one slab, contiguous and free to be changed.

        Raises:
            UsageError: there is no such tensor, or what is stored of it is damaged.
        """
        stored = self._stored(slab)
        low = (*slab.at, *(0 for _ in stored.shape[len(slab.at) :]))
        high = (*(index + 1 for index in slab.at), *stored.shape[len(slab.at) :])
        shape = stored.shape[len(slab.at) :]
        touching = [chunk for chunk in stored.chunks if chunk.overlap(low, high) is not None]
        if len(touching) == 1 and touching[0].offsets == low and touching[0].end == high:
            return self._load(touching[0], stored.dtype).view(shape)
        result = torch.empty(shape, dtype=stored.dtype)
        covered = 0
        for chunk in touching:
            starts, ends = chunk.overlap(low, high) or ((), ())
            block = self._load(chunk, stored.dtype)
            taken = tuple(slice(a - o, b - o) for a, b, o in zip(starts, ends, chunk.offsets, strict=True))
            place = tuple(slice(a - o, b - o) for a, b, o in zip(starts, ends, low, strict=True))
            result[place[len(slab.at) :]] = block[taken].view([end.stop - end.start for end in place[len(slab.at) :]])
            covered += block[taken].numel()
        if covered != result.numel():
            raise self._damaged(f"the chunks of {slab} do not cover it")
        return result

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._load_value(chunk)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
            raise self._damaged(f"{chunk.file} holds something else at byte {chunk.start} than {METADATA_FILE} says")
        return tensor.detach()

    def read_object(self, key: str) -> Any:
        """Read what is stored beside tensors, such as random states; plain values only."""
        return self._load_value(self.objects[key])

    def _load_value(self, chunk: Chunk) -> Any:
        try:
            with open(self.folder / chunk.file, "rb") as file:
                window = io.BufferedReader(_Window(file, chunk.start, chunk.length))
                check_archive(window)
                return torch.load(window, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in any way
            reason = (str(error).splitlines() or [""])[0][:120]
            raise self._damaged(f"{chunk.file} cannot be read ({type(error).__name__}: {reason})") from error


def damaged(folder: Path, reason: str) -> UsageError:
    """The error about a checkpoint that is not as it was written."""
    return UsageError(f"the checkpoint {folder} is damaged: {reason}; take another copy, or an older one")


def check_format(folder: Path) -> None:
    """See that a folder is a checkpoint in the format that is read here.

    Raises:
        UsageError: it is none, or in another format or a later version of it.
    """
    path = folder / FORMAT_FILE
    try:
        found = read_json(path)
        backend, version = found.get("sharded_backend"), found.get("sharded_backend_version", BACKEND_VERSION)
    except OSError as error:
        raise UsageError(
            f"{folder} is no torch_dist checkpoint: {FORMAT_FILE} cannot be read ({error.strerror});"
            " name the folder of one iteration, iter_..."
        ) from error
    except (ValueError, AttributeError) as error:
        raise damaged(folder, f"its {FORMAT_FILE} is not JSON") from error
    if backend != BACKEND:
        raise UsageError(
            f"{folder} is in the format {shown(backend)}; only {BACKEND!r} is read: save it"
            " again with --ckpt-format torch_dist"
        )
    if version != BACKEND_VERSION:
        raise UsageError(
            f"{folder} is in version {shown(version)} of the format {BACKEND!r}; version {BACKEND_VERSION} is read, as"
            f" megatron-core {SUPPORTED} writes it: save it again with one of these"
        )


def has_common(folder: Path) -> bool:
    """Whether a checkpoint has its common state, in one of the two forms; it need not be whole otherwise."""
    if (folder / COMMON_FILE).is_file():
        return True
    try:
        return COMMON_OBJECT in load_metadata(folder / METADATA_FILE).state_dict_metadata
    except UsageError:
        return False


def read_common(folder: Path) -> dict[str, Any]:
    """Return the common state of a checkpoint of ours: plain values.

    Raises:
        UsageError: it cannot be read, is damaged, or holds code objects.
    """
    if not (folder / COMMON_FILE).is_file():
        return CheckpointReader(folder).common
    values = load_values(folder / COMMON_FILE)
    if not isinstance(values, dict):
        raise damaged(folder, f"its {COMMON_FILE} holds no names with values")
    return values


def _counts(numbers: Any) -> tuple[int, ...]:
    """Whole numbers from 0 on, as offsets and sizes are. Raises: ValueError."""
    counts = tuple(numbers)
    if any(type(number) is not int or number < 0 for number in counts):
        raise ValueError(f"{shown(counts)} are no sizes")
    return counts
