"""Folders of checkpoints: where one of an iteration is, which are complete, and which is the newest."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_hyperp import checksums
from megatron_hyperp.convert.storage import has_common
from megatron_hyperp.errors import UsageError
from megatron_hyperp.megatron_compat.checkpoints import COMMON_FILE, FORMAT_FILE, METADATA_FILE
from megatron_hyperp.training.logging import CONFIG_FILE

# Names the newest checkpoint of a folder, as Megatron-LM's does.
TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_folder(root: str | Path, iteration: int) -> Path:
    """Return the folder of one iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """Return the iteration of a checkpoint's folder."""
    return int(folder.name.removeprefix("iter_"))


def find_checkpoint(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint under ``root`` (or ``root`` itself if it is one), or None if there is none.

    The newest is what the tracker file names; without that file, the last one.

    Raises:
        UsageError: the tracker file names a checkpoint that is not there.
    """
    folder = _newest(Path(root))
    if folder is not None and not _is_complete(folder):
        raise _names_nothing(folder.parent)
    return folder


def candidates(root: str | Path) -> list[Path]:
    """Return the newest checkpoint under ``root``, complete or not, and the complete ones before it, newest first.

    If ``root`` is a checkpoint itself, it is the only one.

    Raises:
        UsageError: the tracker file names what is not even a folder there.
    """
    newest = _newest(Path(root))
    if newest is None or newest == Path(root):
        return [] if newest is None else [newest]
    older = [path for path in complete_checkpoints(Path(root)) if iteration_of(path) < iteration_of(newest)]
    return [newest, *reversed(older)]


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints under ``root``, oldest iteration first."""
    folders = [path for path in root.glob("iter_*") if re.fullmatch(r"iter_[0-9]+", path.name) and _is_complete(path)]
    return sorted(folders, key=iteration_of)


def read_tracker(path: Path) -> str:
    """Return the first word or two of a tracker file, whatever it holds."""
    with path.open(errors="replace") as stream:
        return stream.read(100).strip()


def iteration_in(word: str) -> int | None:
    """Return the iteration that a tracker file names, if it is one."""
    return int(word) if re.fullmatch(r"[0-9]{1,12}", word) else None


def fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, as far as the sizes of its files and the content of small ones tell."""
    return checksums.first_fault(folder) or _missing(folder)


def _newest(root: Path) -> Path | None:
    """Return ``root``, if it is a checkpoint, or the folder that its tracker names."""
    if _is_complete(root):
        return root
    tracker = root / TRACKER
    if not tracker.is_file():
        # Lost, or the first save was killed before it wrote it: what is complete must not be trained over.
        return next(reversed(complete_checkpoints(root)), None)
    iteration = iteration_in(read_tracker(tracker))
    if iteration is None or not checkpoint_folder(root, iteration).is_dir():
        raise _names_nothing(root)
    return checkpoint_folder(root, iteration)


def _names_nothing(root: Path) -> UsageError:
    found = ", ".join(path.name for path in complete_checkpoints(root)) or "none"
    return UsageError(
        f"{root / TRACKER} names iteration {read_tracker(root / TRACKER)[:20]!r}, which is not a checkpoint in {root};"
        f" complete ones there: {found}; name one with --load {root}/iter_..."
    )


def _is_complete(folder: Path) -> bool:
    return _missing(folder) is None


def _missing(folder: Path) -> str | None:
    """Return what is missing from a complete checkpoint, or None if nothing is."""
    absent = [name for name in (CONFIG_FILE, FORMAT_FILE, METADATA_FILE) if not (folder / name).is_file()]
    if absent:
        return f"{', '.join(absent)} missing"
    return None if has_common(folder) else f"{COMMON_FILE} is missing"
