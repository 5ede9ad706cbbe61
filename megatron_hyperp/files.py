"""Small files that a killed process leaves whole: the old one or the new one."""

from __future__ import annotations

import os
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
