"""Pickles of others, read without running any code of theirs.

A pickle names classes and functions, and may call them. Here the names that a checkpoint of tensors needs are allowed,
and any other is refused by name.
"""

from __future__ import annotations

import argparse
import io
import itertools
import pathlib
import pickle
import signal
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import check_file, read_small

# What torch.distributed.checkpoint writes into its ``.metadata``, with the plans that Megatron-Core keeps there.
_METADATA_NAMES: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}
_MCORE_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"


class _Placeholder:
    """Stands for what a pickle holds and nobody here reads."""


# Bytes of a ``.metadata``: that of a trillion parameters on 10,000 ranks has a tenth of them.
_LARGEST_METADATA = 2**30


class _MetadataUnpickler(pickle._Unpickler):
    """Python's own, no slower here than the one in C, which takes a pickle's word for the size of its memo."""

    memo: dict[int, Any]
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._most = len(content)

    def load_long_binput(self) -> None:
        super().load_long_binput()  # type: ignore[misc]
        self._check_memo()

    def load_put(self) -> None:
        super().load_put()  # type: ignore[misc]
        self._check_memo()

    def _check_memo(self) -> None:
        """Torch reads the file again, with the unpickler in C: there an index of 2^31 is as many entries."""
        if next(reversed(self.memo)) > self._most:
            raise pickle.UnpicklingError("an index of its memo is larger than the file")

    def load_build(self) -> None:
        """Give an object its state: never a class, whose methods everyone has."""
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("it would change a class")
        super().load_build()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        """Takes memory first and reads then; there are no such arrays in an index."""
        raise pickle.UnpicklingError("a bytearray")

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput
    dispatch[pickle.PUT[0]] = load_put
    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _MCORE_STRATEGY and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _Placeholder
        raise _CodeObjectError(f"{module}.{name}")


class _CodeObjectError(pickle.UnpicklingError):
    """A name that no checkpoint of tensors needs; the message is the name."""


def load_metadata(path: Path) -> Any:
    """Read torch.distributed.checkpoint's ``.metadata``.

    Raises:
        UsageError: it cannot be read, is damaged, or names what a checkpoint of tensors does not need.
    """
    try:
        metadata = _MetadataUnpickler(read_small(path, most=_LARGEST_METADATA)).load()
        # Both are dictionaries in any whole file.
        len(metadata.state_dict_metadata), len(metadata.storage_data)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except _CodeObjectError as error:
        raise refusal(path, [str(error)]) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise UsageError(f"{path} is damaged ({type(error).__name__}); take another copy of the checkpoint") from error
    return metadata


def refusal(path: Path, names: Iterable[str]) -> UsageError:
    """The error about a file that would run code."""
    return UsageError(
        f"{path} holds code objects ({', '.join(sorted(names))}), which loading would run; only tensors and plain"
        " values are read: have it written again without them, as safetensors, say"
    )


def load_values(path: Path, *, allowed: Iterable[Any] = (), mmap: bool = False) -> Any:
    """Read a file of ``torch.save`` that holds tensors and plain values.

    Args:
        path: the file.
        allowed: classes that may be in it besides.
        mmap: leave tensors in the file until they are used.

    Raises:
        UsageError: it cannot be read, is damaged, or holds code objects; each of those is named.
    """
    try:
        check_file(path)
        with path.open("rb") as file:
            return read_values(file, path, allowed=allowed, mmap=mmap)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}; check the path") from error


def read_values(file: IO[bytes], path: Path, *, allowed: Iterable[Any] = (), mmap: bool = False) -> Any:
    """Read an archive of ``torch.save`` that holds tensors and plain values, from an open file.

    Args:
        file: at its beginning.
        path: of the file, for messages.
        allowed: classes that may be in it besides.
        mmap: leave tensors in the file at ``path``, which is the same, until they are used.

    Raises:
        OSError: it cannot be read.
        UsageError: it is damaged, or holds code objects; each of those is named.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            check_archive(file)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if foreign:
                raise refusal(path, foreign)
            file.seek(0)
            return torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except (UsageError, OSError):
        raise
    except Exception as error:  # a damaged file fails in any way
        names = _names_in(error)
        if names:
            raise refusal(path, names) from error
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {reason}); take another copy") from error


def check_archive(file: IO[bytes]) -> None:
    """See that a file of ``torch.save`` unpacks to no more than it is; the file is at its beginning afterwards.

    Raises:
        ValueError: it is no zip archive, or is packed, which torch never does: a kilobyte may stand for a gigabyte.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"no archive of torch.save ({error}); torch 1.5 and older wrote none: save it again"
        ) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("an archive that is packed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("an archive with more in it than its size")
    file.seek(0)


def _names_in(error: Exception) -> list[str]:
    """Names that torch's restricted unpickler has refused."""
    words = str(error).split()
    return [after for word, after in itertools.pairwise(words) if word == "GLOBAL"]


# Enumerations of Megatron-LM's arguments, in megatron.core.transformer.enums of any version up to 0.19.
_ENUMERATIONS = (
    *("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend"),
    *("CudaGraphScope", "CudaGraphModule", "InferenceCudaGraphScope"),
)


class _Setting:
    """Stands for a value of an enumeration that the installed Megatron-Core does not have, and that nobody here reads.

    Args:
        value: as in the file.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def megatron_classes() -> Iterator[Any]:
    """Classes that Megatron-LM's arguments are made of: the namespace, enumerations, paths and signals.

    An enumeration that is only in newer versions than the installed one comes as a stand-in with its name.
    """
    from megatron.core import enums as older
    from megatron.core.transformer import enums

    yield from (argparse.Namespace, pathlib.PosixPath, signal.Signals, older.ModelType)
    for name in _ENUMERATIONS:
        yield getattr(enums, name, None) or (_Setting, f"{enums.__name__}.{name}")
