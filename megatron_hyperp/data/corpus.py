"""Documents: finding the files that hold them, and reading them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_hyperp.errors import UsageError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".txt", ".md", ".rst", ".py")
PYTHON_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")


class Document(NamedTuple):
    """One document of a corpus.

    Attributes:
        text: its text.
        source_bytes: the bytes of the input file it was read from.
    """

    text: str
    source_bytes: int


@dataclass(frozen=True)
class Corpus:
    """The documents of some files, in order: each line of a JSON-lines file, each other file as a whole.

    Attributes:
        paths: the files.
        json_key: where a line of a JSON-lines file holds its text.
        max_bytes: stop before the document that would go above this many bytes of input.
        limit: stop after this many documents.
    """

    paths: tuple[Path, ...]
    json_key: str = "text"
    max_bytes: int | None = None
    limit: int | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of input; fewer are read where ``limit`` stops earlier."""
        total = sum(path.stat().st_size for path in self.paths)
        return total if self.max_bytes is None else min(total, self.max_bytes)

    def __iter__(self) -> Iterator[Document]:
        """Read the documents.

        Raises:
            UsageError: for a file that cannot be read, is not UTF-8, or holds a line without the key.
        """
        remaining = math.inf if self.max_bytes is None else self.max_bytes
        for number, document in enumerate(self._read_all()):
            remaining -= document.source_bytes
            if remaining < 0 or number == self.limit:
                return
            yield document

    def _read_all(self) -> Iterator[Document]:
        for path in self.paths:
            try:
                if path.suffix in JSON_LINES_SUFFIXES:
                    yield from _read_json_lines(path, self.json_key)
                else:
                    yield _read_text(path)
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror}; check the path") from error


def find_files(inputs: Sequence[str | os.PathLike[str]], suffixes: Sequence[str] = FOLDER_SUFFIXES) -> tuple[Path, ...]:
    """Return the files that inputs stand for, in order.

    Args:
        inputs: files, taken as they are, and folders, searched to any depth in the order of their paths.
        suffixes: which files of a folder are taken.

    Raises:
        UsageError: when an input does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in _walk(path) if file.suffix in suffixes)
            if not found:
                raise UsageError(f"folder {path} holds no {', '.join(suffixes)} file; name others with --suffixes")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"input {path} does not exist; give text files, JSON-lines files or folders")
    return tuple(files)


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


def _walk(root: Path, skip: Sequence[str] = ("__pycache__",)) -> Iterator[Path]:
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


def _read_text(path: Path) -> Document:
    content = path.read_bytes()
    try:
        return Document(content.decode(), len(content))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error


def _read_json_lines(path: Path, key: str) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Document(_parse_line(line, key, f"{path}:{number}"), len(line))


def _parse_line(line: bytes, key: str, where: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({error}); a JSON-lines file holds one object a line") from error
    text = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(fields)) if isinstance(fields, dict) else "none, as it is no object"
        raise UsageError(f"{where} has no text under {key!r} (its keys: {keys}); name the key with --json-key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} holds half a surrogate pair, which is no text; mend the line") from error
    return text
