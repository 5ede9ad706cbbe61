"""Small files: written so that a killed process leaves the old one or the new one; read without trust in them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hyperp.errors import UsageError

# Bytes of a config, an index or a tokenizer: the largest published ones are a tenth of it.
LARGEST = 2**28

# How to get at what is in an object store, by the scheme of its address.
_AWS = "copy it with `aws s3 sync`, or mount the bucket with mount-s3"
_GOOGLE = "copy it with `gcloud storage rsync`, or mount the bucket with gcsfuse"
_AZURE = "copy it with `azcopy`, or mount the container with blobfuse2"
_WAYS = {
    **dict.fromkeys(("s3", "s3a", "s3n"), _AWS),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "wasb", "wasbs"), _AZURE),
    "hf": "download it with `hf download`",
    "file": "leave out file://",
}


def not_local(path: str) -> str | None:
    """Say why a path is none of a file system, if it is the address of an object store, and what to do instead.

    The file functions of Python would make a local folder called "s3:" of it.
    """
    # One slash: pathlib has been at it.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", path)
    if scheme is None:
        return None
    way = _WAYS.get(scheme[1].lower(), "copy it to a file system, or mount its storage")
    return (
        f"{path} is an address, not a path: files are read and written on file systems alone; {way}, and give its path"
    )


def local_path(text: str) -> str:
    """Return a path of a command line, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is the address of an object store.
    """
    fault = not_local(text)
    if fault is not None:
        raise argparse.ArgumentTypeError(fault)
    return text


def read_small(path: Path, *, most: int = LARGEST) -> bytes:
    """Read a file that may be of someone else: no pipe, which might never end, and nothing that fills the memory.

    Raises:
        OSError: it cannot be read, is no file, or has more than so many bytes.
    """
    size = check_file(path)
    if size > most:
        raise OSError(errno.EFBIG, f"Larger than {most:,} bytes")
    return path.read_bytes()


def check_file(path: Path) -> int:
    """See that opening a file cannot wait for ever; return its size.

    Raises:
        OSError: it is not there, or is a pipe or a device.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a name with a NUL in it
        raise OSError(errno.EINVAL, str(error)) from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "Not a file")
    return status.st_size


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, which a file of others gave: no path that leads out of it."""
    # Unlike Path.is_file, it minds no name that is too long or has a NUL in it.
    return Path(name).name == name and os.path.isfile(folder / name)


def read_json(path: Path, *, most: int = LARGEST) -> Any:
    """Read a JSON file. Raises: OSError as :func:`read_small`; ValueError: it is not JSON, or nested too deeply."""
    try:
        return json.loads(read_small(path, most=most))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
            flush(temporary)
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; {remedy}") from error


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk and outlast a loss of power.

    Raises:
        OSError: they cannot be written there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems flush no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


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
