"""Saving and loading of Megatron-Core's torch_dist checkpoints, in the one form that all supported versions read.

What all ranks share, the *common state*, is in a file of its own, ``common.pt``, up to Megatron-Core 0.18. From 0.19 on
it is an object among the tensors; that version reads the file as well, if there is one, and 0.18 and older read nothing
else. Checkpoints written here have the file under every version.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

COMMON_FILE, METADATA_FILE, FORMAT_FILE = "common.pt", ".metadata", "metadata.json"
# The object's only shard: a list with one dictionary.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND, BACKEND_VERSION = "torch_dist", 1


def begin_save(state: dict[str, Any], folder: Path) -> Any:
    """Plan a save and write the common state; a collective call.

    Megatron-Core's own writer is selected where there is a choice. From 0.17 on the default is nvidia-resiliency-ext's,
    which fails without that package and does not report through :mod:`async_saving` with it.

    Args:
        state: sharded tensors and objects, and the common state.
        folder: to write into; it is there.

    Returns:
        Megatron-Core's request, which writes the tensors and then calls the functions added to it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    strategy = {"async_strategy": "mcore"} if takes_strategy else {}
    request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **strategy)
    if dist.get_rank() == 0 and not (folder / COMMON_FILE).exists():
        torch.save(extract_sharded_base(state)[1], folder / COMMON_FILE)
    return request


def load(state: dict[str, Any], folder: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Return the state with its tensors and objects read from a checkpoint, and the common state; a collective call.

    Args:
        state: sharded tensors and objects to read.
        folder: the checkpoint.
        common: its common state, for versions of Megatron-Core that do not find it there.
    """
    from megatron.core import dist_checkpointing

    with _with_common_file(folder, common) as readable:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(readable))
    return loaded


@contextmanager
def _with_common_file(folder: Path, common: dict[str, Any]) -> Iterator[Path]:
    """Yield the checkpoint, or, if it has no ``common.pt``, a folder of links to its files with one."""
    if (folder / COMMON_FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        for path in folder.iterdir():
            os.symlink(path.resolve(), view / path.name)
        torch.save(common, view / COMMON_FILE)
        yield view


def missing_data(folder: Path) -> str | None:
    """Return what is missing from a checkpoint that this job has just written, or None if it is complete.

    Files and their sizes are compared with the metadata. The metadata is unpickled without restrictions, as torch does:
    only for files that this job wrote itself.

    Raises:
        Exception: the metadata cannot be read.
    """
    if not (folder / COMMON_FILE).is_file():
        return f"{COMMON_FILE} is missing"
    ends: dict[str, int] = {}
    for place in FileSystemReader(folder).read_metadata().storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            return f"{name} is missing" if size is None else f"{name} has {size:,} bytes of {end:,}"
    return None
