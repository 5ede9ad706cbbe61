"""Small files that a killed process leaves whole: the old one or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hyperp.errors import UsageError


def write_atomically(
    path: Path, content: str | bytes, *, remedy: str = "choose another place", durable: bool = False
) -> None:
    """Write a file, and its folder if there is none.

    Args:
        path: the file.
        content: text is written as UTF-8.
        remedy: what a user can do where that fails.
        durable: wait until it is on the disk, so that the loss of power leaves it whole as well.

    Raises:
        UsageError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; {remedy}") from error


@contextmanager
def finished_folder(path: Path, flag: str = "--output") -> Iterator[Path]:
    """Yield a folder to fill, which takes its name only when the block ends well; otherwise nothing is left of it.

    Args:
        path: the folder to come; it must not be there, or be empty.
        flag: that names it.

    Raises:
        UsageError: it is there and holds something, or cannot be written.
    """
    partial = path.with_name(f"partial_{os.getpid()}_{path.name}")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{flag} {path} is there already; name a new folder, or remove that one")
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror or error}; name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
