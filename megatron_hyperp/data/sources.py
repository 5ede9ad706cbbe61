"""Finding the inputs of a corpus: which files are read, as what, and which are skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_hyperp.data.formats import COLUMNS, LFS_POINTER, READABLE_AS, Detected, detect
from megatron_hyperp.data.records import read_records
from megatron_hyperp.data.streams import COMPRESSED_SUFFIXES, STANDARD_INPUT, Stream, name_of
from megatron_hyperp.errors import UsageError, printable

AUTO = "auto"
_NAMES_SHOWN = 3
_REASONS_SHOWN = 8


class Source(NamedTuple):
    """One input of a corpus.

    Attributes:
        path: of the file or pipe; ``-`` is standard input.
        format: one of ``FORMATS``; ``auto`` for a pipe, which is recognized when it is read.
        compression: as of ``compression_of``.
        size: bytes of the file, compressed if it is; None for a pipe.
    """

    path: Path
    format: str
    compression: str = ""
    size: int | None = None


class Skipped(NamedTuple):
    """A file or folder that was found and is not read."""

    path: Path
    reason: str


@dataclass
class Sources:
    """What inputs stand for.

    Attributes:
        read: the inputs that are read, in order.
        skipped: what was found in folders and is not read, and empty files.
    """

    read: list[Source] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def describe(self) -> str:
        """Return a line on what is read, and one on what is skipped, if anything is."""
        kinds = Counter(kind_name(source.format, source.compression) for source in self.read)
        files = f"{len(self.read):,} input{'s' * (len(self.read) != 1)}"
        lines = [f"reading {files}: {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}"]
        if self.skipped:
            lines.append(f"skipped {describe_skipped(self.skipped)}")
        return "\n".join(lines)


def kind_name(format: str, compression: str) -> str:
    """Return what reports call a format, for example ``jsonl (gzip)``."""
    name = "recognized when read" if format == AUTO else format
    return f"{name} ({compression})" if compression else name


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Return how many files were skipped and why, with a few names for each reason."""
    by_reason: dict[str, list[str]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(item.path.name)
    parts = []
    for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        more = ", ..." if len(names) > _NAMES_SHOWN else ""
        parts.append(printable(f"{len(names):,} {reason}: {', '.join(names[:_NAMES_SHOWN])}{more}"))
    if len(parts) > _REASONS_SHOWN:
        parts[_REASONS_SHOWN:] = [f"{len(parts) - _REASONS_SHOWN} more reasons"]
    return f"{len(skipped):,} ({'; '.join(parts)})"


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], *, suffixes: Sequence[str] = (), format: str = AUTO, key: str = "text"
) -> Sources:
    """Find the files that inputs stand for, and recognize their formats.

    Args:
        inputs: files and pipes, which are taken as they are, ``-`` for standard input, and folders, which are searched
            to any depth in the order of their paths.
        suffixes: which files of a folder are taken; all by default.
        format: one of ``FORMATS``, or ``auto``. A file that is named is read in this format; of a folder the files in
            this format are read.
        key: where records hold their text.

    Raises:
        UsageError: an input does not exist or cannot be read, a file that is named is not text, a folder holds
            nothing that is read, or records without the key next to plain text.
    """
    found = Sources()
    for path in map(Path, inputs):
        if path == STANDARD_INPUT:
            if any(source.path == path for source in found.read):
                raise UsageError("standard input (-) can be read once only; give it once")
            found.read.append(Source(path, format))
        elif path.is_dir():
            inside = _search(path, suffixes, format, key)
            found.read += inside.read
            found.skipped += inside.skipped
        elif path.is_file():
            source, detected = _look(path, key)
            if format != AUTO:
                found.read.append(source._replace(format=format))
            elif detected.reason == "empty":
                found.skipped.append(Skipped(path, "empty"))
            else:
                found.read.append(source._replace(format=accepted(path, detected)))
        elif path.exists():
            found.read.append(Source(path, format))
        else:
            raise UsageError(f"input {path} does not exist; give files, folders, or - for standard input")
    if not found.read:
        raise UsageError(f"the input holds nothing to read: skipped {describe_skipped(found.skipped)}")
    for source in found.read:
        if source.format in COLUMNS and source.size is not None:
            with Stream(source.path) as stream:
                next(read_records(stream, source.format, key), None)  # refuses a missing column before hours of work
    return found


def accepted(path: Path, detected: Detected) -> str:
    """Return the format of an input that was named.

    Raises:
        UsageError: when it is not text.
    """
    if detected.reason:
        remedy = "leave it out, or convert it to text, JSON lines or Parquet"
        raise UsageError(f"{name_of(path)} is not text, but {detected.reason}; {remedy}")
    return detected.format


def _look(path: Path, key: str) -> tuple[Source, Detected]:
    """Open a file and recognize its format."""
    try:
        with Stream(path) as stream:
            detected = detect(stream.head, head_is_all=stream.head_is_all, path=path, key=key)
            source = Source(path, detected.format, stream.compression, stream.size)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if detected.reason == LFS_POINTER:
        raise UsageError(f"{path} is a Git LFS pointer to a file that was not downloaded; run git lfs pull")
    return source, detected


def _search(folder: Path, suffixes: Sequence[str], format: str, key: str) -> Sources:
    """Find what a folder holds: records, or else plain text."""
    found = Sources()
    keys: list[tuple[str, ...]] = []
    for path, reason in sorted(_walk(folder)):
        if not reason and suffixes and not _has_suffix(path, suffixes):
            reason = f"not {' or '.join(suffixes)}"
        if not reason:
            source, detected = _look(path, key)
            if detected.reason:
                reason = detected.reason
            elif format != AUTO and detected.format not in READABLE_AS[format]:
                reason = f"{detected.format}, not {format}"
            elif detected.keys is not None and format != "text":
                reason = f"JSON without {key!r}"
                keys.append(detected.keys)
            else:
                found.read.append(source if format == AUTO else source._replace(format=format))
                continue
        found.skipped.append(Skipped(path, reason))
    if format == AUTO:
        _separate(folder, found, keys, key)
    if not found.read:
        skipped = f"skipped {describe_skipped(found.skipped)}" if found.skipped else "it is empty"
        raise UsageError(f"folder {folder} holds nothing to read: {skipped}{_keys_hint(keys)}")
    return found


def _separate(folder: Path, found: Sources, keys: Sequence[tuple[str, ...]], key: str) -> None:
    """Keep records apart from plain text, which next to them is a README or a license."""
    texts = [source for source in found.read if source.format == "text"]
    if len(texts) < len(found.read):
        found.read = [source for source in found.read if source.format != "text"]
        found.skipped += [Skipped(source.path, "plain text next to records") for source in texts]
    elif texts and keys:
        raise UsageError(
            f"folder {folder} holds {len(texts):,} plain text and {len(keys):,} JSON without {key!r}: choose between "
            f"them with --suffixes, or with --format text{_keys_hint(keys)}"
        )


def _keys_hint(keys: Sequence[tuple[str, ...]]) -> str:
    return (
        f"; --json-key names where JSON holds its text (keys of the first: {', '.join(keys[0][:20])})" if keys else ""
    )


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file of a folder, and why it is not to be opened; of folders that are not searched their own path."""
    for root, subfolders, names in os.walk(folder, onerror=_refuse_folder):
        for name in list(subfolders):
            path = Path(root, name)
            reason = "hidden" if name.startswith(".") else "cache of Python" if name == "__pycache__" else ""
            if path.is_symlink():
                reason = "link to a folder"
            if reason:
                subfolders.remove(name)
                yield path, reason
        for name in names:
            path = Path(root, name)
            yield path, "hidden" if name.startswith(".") else "" if path.is_file() else "not a file, or a broken link"


def _refuse_folder(error: OSError) -> None:
    raise UsageError(f"folder {error.filename} cannot be read: {error.strerror}; check its permissions") from error


def _has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a name ends in a suffix, also before the suffix of a compression."""
    name = path.name
    for compressed in COMPRESSED_SUFFIXES:
        if name.lower().endswith(compressed):
            return name.endswith(tuple(suffixes)) or name[: -len(compressed)].endswith(tuple(suffixes))
    return name.endswith(tuple(suffixes))
