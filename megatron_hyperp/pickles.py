"""Pickles of others, read without running any code of theirs.

A pickle names classes and functions, and may call them. Here the names that a checkpoint of tensors needs are allowed,
and any other is refused by name.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import pathlib
import pickle
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp.errors import UsageError

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


class _MetadataUnpickler(pickle.Unpickler):
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
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
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
    allowed = list(allowed)
    try:
        with torch.serialization.safe_globals(allowed):
            with contextlib.suppress(ValueError):  # of files that are no zip archive: they fail below
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
                if foreign:
                    raise refusal(path, foreign)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except Exception as error:  # a damaged file fails in any way
        names = _names_in(error)
        if names:
            raise refusal(path, names) from error
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {reason}); take another copy") from error


def _names_in(error: Exception) -> list[str]:
    """Names that torch's restricted unpickler has refused."""
    words = str(error).split()
    return [after for word, after in itertools.pairwise(words) if word == "GLOBAL"]


def megatron_classes() -> Iterator[Any]:
    """Classes that Megatron-LM's arguments are made of: the namespace, enumerations, paths and signals."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType, AttnType, LayerType

    yield from (argparse.Namespace, pathlib.PosixPath, signal.Signals)
    yield from (ModelType, AttnBackend, AttnMaskType, AttnType, LayerType)
