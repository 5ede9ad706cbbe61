"""Folders of safetensors, written and read tensor by tensor.

The library's own writer wants the tensors of a whole file in memory, and its reader maps files into memory, where
what was read stays counted; the format is a length, a JSON header and the numbers.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import holds, read_json

INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = struct.Struct("<Q")
# A header of more is no header: the library allows as much.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to come: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        # In Python's integers: torch's wrap around.
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Write tensors in the order of their specs, into files of at most so many bytes; a context manager.

    Args:
        folder: that is there.
        specs: all tensors.
        shard_bytes: of a file, if it holds more than one tensor; None for one file.
        stem: of the files' names.
    """

    def __init__(
        self, folder: Path, specs: Sequence[Spec], *, shard_bytes: int | None = None, stem: str = "model"
    ) -> None:
        self._folder, self._stem = folder, stem
        self._shards = _shards(specs, shard_bytes)
        self._coming = [(number, spec) for number, shard in enumerate(self._shards) for spec in shard]
        self._next = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            assert self._next == len(self._coming), "tensors are missing"
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        number, spec = self._coming[self._next]
        assert (spec.name, spec.shape, spec.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        if self._next == 0 or self._coming[self._next - 1][0] != number:
            self._begin(number)
        assert self._file is not None
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._file)
        self._next += 1

    def _begin(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in self._shards[number]:
            end = start + spec.nbytes
            header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self._folder / self._file_name(number), "wb")  # noqa: SIM115  (closed when the next begins)
        self._file.write(_LENGTH.pack(len(text)) + text)
        self._file.flush()

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{number + 1:05}-of-{count:05}.safetensors"

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            total = sum(spec.nbytes for _, spec in self._coming)
            places = {spec.name: self._file_name(number) for number, spec in self._coming}
            content = {"metadata": {"total_size": total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _shards(specs: Iterable[Spec], limit: int | None) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and limit is not None and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    spec: Spec


class TensorReader:
    """The tensors of a folder's safetensors; headers are read and checked at once, tensors when asked for.

    Args:
        folder: with ``model.safetensors``, or the index of several.
        stem: of the files' names.

    Raises:
        UsageError: there are none, one is missing, truncated or damaged, or weights are pickled.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        for path in self._files(stem):
            self._places.update(_read_header(path))

    def _files(self, stem: str) -> list[Path]:
        index, single = self.folder / f"{stem}.safetensors.index.json", self.folder / f"{stem}.safetensors"
        if index.is_file():
            try:
                names = sorted(set(map(str, read_json(index)["weight_map"].values())))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} is damaged ({type(error).__name__}); take another copy") from error
            # A name from a file of others must not lead out of the folder.
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise UsageError(f"{index} names {outside[0]!r}, outside of its folder; take another copy")
            missing = [name for name in names if not holds(self.folder, name)]
            if missing:
                raise UsageError(
                    f"{self.folder} lacks {', '.join(missing)}, which its index names; download them again"
                )
            return [self.folder / name for name in names]
        if single.is_file():
            return [single]
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        found = f"; {pickled[0]} is pickled, which may run code: convert it to safetensors" if pickled else ""
        raise UsageError(f"{self.folder} holds no {stem}.safetensors, nor an index of several{found}")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def spec(self, name: str) -> Spec:
        """Return a tensor's name, shape and dtype.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self._places:
            raise UsageError(f"{self.folder} lacks the tensor {name}; it is of another architecture, or not whole")
        return self._places[name].spec

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, contiguous and free to be changed. Raises: as :meth:`spec`."""
        spec = self.spec(name)
        place = self._places[name]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        numbers = np.fromfile(place.path, dtype=np.uint8, count=spec.nbytes, offset=place.start)
        return torch.from_numpy(numbers).view(spec.dtype).view(spec.shape)


def _read_header(path: Path) -> dict[str, _Place]:
    """Return where the tensors of a file are.

    Raises:
        UsageError: it is not whole, or its header is no header.
    """
    try:
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            size = file.seek(0, 2)
            if length > min(_LARGEST_HEADER, size):
                raise ValueError("its header is too long")
            file.seek(_LENGTH.size)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        base = _LENGTH.size + length
        return {name: _place(path, base, size, name, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UsageError(f"{path} is no whole safetensors file ({error}); take another copy") from error


def _place(path: Path, base: int, size: int, name: str, entry: Any) -> _Place:
    """Return where an entry of a header says that its tensor is, in a file of so many bytes.

    Raises:
        ValueError, KeyError, TypeError: it cannot be there.
    """
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"{name} has a size or place that is no number")
    spec = Spec(name, shape, _DTYPES[entry["dtype"]])
    if end - start != spec.nbytes:
        raise ValueError(f"{name} has a wrong size")
    if base + end > size:
        raise ValueError(f"it ends {base + end - size:,} bytes too early")
    # Torch counts in 64 bits, also of a shape with a zero in it.
    if math.prod(number or 1 for number in shape) >= 2**63:
        raise ValueError(f"{name} has a shape that no tensor has")
    return _Place(path, base + start, spec)
