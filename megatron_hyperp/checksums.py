"""Checksums of files: taken when they are written, compared before they are used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_hyperp.files import holds, read_json, write_atomically

FILE = "checksums.json"
# What every rank reads anyway, before there are process groups: compared by each of them.
SMALL = 2**20
_BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a file was when it was written.

    Attributes:
        size: bytes.
        xxh3: XXH3 of its content, 128 bits in hexadecimal digits; no defence against someone who means to change it.
    """

    size: int
    xxh3: str


def checksum(path: Path) -> Checksum:
    """Read a file for its checksum."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Checksum(size, digest.hexdigest())


def write(folder: Path, sums: Mapping[str, Checksum], name: str = FILE) -> None:
    """Write the checksums of a folder's files into a file there."""
    content = {file: {"size": each.size, "xxh3_128": each.xxh3} for file, each in sorted(sums.items())}
    write_atomically(folder / name, json.dumps(content, indent=1) + "\n", durable=True)


def write_all(folder: Path, *, but: str) -> None:
    """Take and write the checksums of all files of a folder but one."""
    write(folder, {path.name: checksum(path) for path in folder.iterdir() if path.is_file() and path.name != but})


def read(folder: Path, name: str = FILE) -> dict[str, Checksum] | None:
    """Return the checksums of a folder's files, from a file there; None if it has none.

    Raises:
        ValueError: they are damaged.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return {
            str(file): Checksum(int(entry["size"]), str(entry["xxh3_128"])) for file, entry in read_json(path).items()
        }
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path.name} is damaged ({type(error).__name__})") from error


def fault(folder: Path, name: str, expected: Checksum, *, content: bool = True) -> str | None:
    """Say what is wrong with a file; None if nothing is.

    Args:
        folder: it is in.
        name: of the file.
        expected: when it was written.
        content: read it; otherwise only its size is compared.
    """
    path = folder / name
    if not holds(folder, name):
        return f"{name} is missing"
    size = path.stat().st_size
    if size != expected.size:
        return f"{name} has {size:,} bytes of {expected.size:,}"
    try:
        return f"{name} is not what was written" if content and checksum(path) != expected else None
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def first_fault(folder: Path) -> str | None:
    """Compare all sizes, and the content of small files; return what is wrong first, or None."""
    try:
        sums = read(folder)
    except ValueError as error:
        return str(error)
    found = (fault(folder, name, each, content=each.size <= SMALL) for name, each in (sums or {}).items())
    return next((each for each in found if each), None)


def faults(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Compare files in full.

    Args:
        folder: they are in.
        names: of some files; None for all that have checksums.

    Raises:
        ValueError: the checksums are damaged.
    """
    sums = read(folder) or {}
    found = (fault(folder, name, sums[name]) for name in (sums if names is None else names))
    return [each for each in found if each]
