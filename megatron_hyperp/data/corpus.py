"""The documents of a corpus, in order; those of the installed Python."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_hyperp.data.formats import detect
from megatron_hyperp.data.records import read_records
from megatron_hyperp.data.sources import AUTO, Source, Sources, accepted, kind_name
from megatron_hyperp.data.streams import Stream, name_of
from megatron_hyperp.errors import UsageError, printable

PYTHON_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_FAULTS_SHOWN = 3


class Document(NamedTuple):
    """One document of a corpus.

    Attributes:
        text: its text.
        source_bytes: the bytes of input that were read for it, compressed as they are in the file.
    """

    text: str
    source_bytes: int


@dataclass
class _Kind:
    """What was read in one format."""

    inputs: int = 0
    documents: int = 0
    source_bytes: int = 0


@dataclass
class ReadCounts:
    """What an iteration over a corpus has read so far.

    Attributes:
        kinds: inputs, documents and bytes of input for each format.
        bad: number of records without text that were left out.
        faults: the first of these, each with its file and line.
    """

    kinds: dict[str, _Kind] = field(default_factory=dict)
    bad: int = 0
    faults: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Begin again."""
        self.kinds, self.bad, self.faults = {}, 0, []

    def describe(self) -> str:
        """Return a table of what was read as what, and a line on bad records, if there were any."""
        lines = [f"{'read as':16} {'inputs':>10} {'documents':>14} {'MB':>12}"]
        for name, kind in sorted(self.kinds.items()):
            megabytes = kind.source_bytes / 1e6
            lines.append(f"{name:16} {kind.inputs:>10,} {kind.documents:>14,} {megabytes:>12,.1f}")
        if self.bad:
            more = ", ..." if self.bad > len(self.faults) else ""
            lines.append(
                printable(f"left out {self.bad:,} bad line{'s' * (self.bad != 1)}: {', '.join(self.faults)}{more}")
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Corpus:
    """The documents of some inputs, in order: each record of a file of records, each text file as a whole.

    Attributes:
        sources: the inputs, and what was skipped to find them.
        json_key: where records (JSON, CSV, Parquet) hold their text.
        max_bytes: stop before the document that would go above this many bytes, decompressed.
        limit: stop after this many documents.
        skip_bad_lines: leave out up to this many records without text.
        counts: of the last iteration.
    """

    sources: Sources
    json_key: str = "text"
    max_bytes: int | None = None
    limit: int | None = None
    skip_bad_lines: int = 0
    counts: ReadCounts = field(default_factory=ReadCounts, compare=False)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of input, compressed as they are; fewer are read where ``limit`` stops earlier. None if not known."""
        sizes = [source.size for source in self.sources.read if source.size is not None]
        if len(sizes) < len(self.sources.read):
            return None
        if self.max_bytes is None:
            return sum(sizes)
        compressed = any(source.compression or source.format == "parquet" for source in self.sources.read)
        return None if compressed else min(sum(sizes), self.max_bytes)

    def __iter__(self) -> Iterator[Document]:
        """Read the documents.

        Raises:
            UsageError: for an input that cannot be read to its end, or one record without text more than
                ``skip_bad_lines`` allows.
        """
        self.counts.clear()
        remaining = math.inf if self.max_bytes is None else self.max_bytes
        for number, (document, size) in enumerate(self._read_all(), start=1):
            remaining -= size
            if remaining < 0:
                return
            yield document
            if number == self.limit:
                return

    def _read_all(self) -> Iterator[tuple[Document, int]]:
        """Yield the documents with their bytes, decompressed."""
        for source in self.sources.read:
            try:
                with Stream(source.path) as stream:
                    yield from self._read(source, stream)
            except OSError as error:
                reason = error.strerror or str(error)
                raise UsageError(f"{name_of(source.path)} cannot be read: {reason}; check the path") from error

    def _read(self, source: Source, stream: Stream) -> Iterator[tuple[Document, int]]:
        format = source.format
        if format == AUTO:
            detected = detect(stream.head, head_is_all=stream.head_is_all, path=source.path, key=self.json_key)
            format = accepted(source.path, detected)
        kind = self.counts.kinds.setdefault(kind_name(format, stream.compression), _Kind())
        kind.inputs += 1
        before = 0
        for record in read_records(stream, format, self.json_key):
            if record.fault:
                self._leave_out(record.fault)
                continue
            read, before = stream.consumed - before, stream.consumed
            kind.documents += 1
            kind.source_bytes += read
            yield Document(record.text, read), record.size

    def _leave_out(self, fault: str) -> None:
        """Count a record without text.

        Raises:
            UsageError: when no more of these are allowed.
        """
        if self.counts.bad == self.skip_bad_lines:
            allowed = f" (bad lines left out before: {self.counts.bad:,})" if self.skip_bad_lines else ""
            raise UsageError(f"{fault}{allowed}; --skip-bad-lines N leaves out up to N bad lines")
        self.counts.bad += 1
        if len(self.counts.faults) < _FAULTS_SHOWN:
            self.counts.faults.append(fault)


def python_corpus_paths(
    *, max_bytes: int | None = None, suffixes: Sequence[str] = PYTHON_SUFFIXES, max_file_bytes: int = 1_000_000
) -> tuple[Path, ...]:
    """Return the source and documentation files of the running Python: standard library and installed packages.

    The order is that of a hash of the relative path, so every stretch of it (a validation split, the first
    ``max_bytes``) is drawn evenly from all packages. Empty, binary, repeated and undecodable files are left out.

    Args:
        max_bytes: size of all files together at most.
        suffixes: which files are taken.
        max_file_bytes: larger files, mostly generated tables, are left out.
    """
    remaining = math.inf if max_bytes is None else max_bytes
    seen: set[bytes] = set()
    chosen: list[Path] = []
    for _, path in sorted(_python_files(suffixes), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if not 0 < path.stat().st_size <= min(max_file_bytes, remaining):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not _is_text(content):
            continue
        seen.add(digest)
        chosen.append(path)
        remaining -= len(content)
    return tuple(chosen)


def _python_files(suffixes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield the files of the running Python, with a name that is the same on every machine."""
    roots = {("stdlib", sysconfig.get_path("stdlib"))}
    roots |= {("site-packages", sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for kind, root in sorted(roots):
        for path in _walk(Path(root), skip=("__pycache__", "site-packages", "dist-packages")):
            if path.suffix in suffixes:
                yield f"{kind}/{path.relative_to(root).as_posix()}", path


def _walk(root: Path, skip: Sequence[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        yield from (path for name in names if (path := Path(folder, name)).is_file())


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
