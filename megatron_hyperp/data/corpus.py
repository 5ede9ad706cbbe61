"""Documents from files, Megatron's indexed format written from them, and the checks before such files are read.

A corpus on disk is a prefix: ``PREFIX.bin`` holds the token ids of all documents, ``PREFIX.idx`` where each begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import sysconfig
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_hyperp.data.tokenizer import Tokenizer
from megatron_hyperp.errors import UsageError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".jsonl", ".ndjson", ".txt", ".md", ".rst", ".py")
PYTHON_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")

_BATCH_CHARACTERS = 2**18
_SECONDS_BETWEEN_LINES = 10.0

# The .idx file: magic, version, dtype code, number of sequences, number of document boundaries; then the length of
# every sequence (int32), its byte offset in the .bin (int64), and the document boundaries (int64).
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHECK_CHUNK = 2**20


class Document(NamedTuple):
    """One document of a corpus.

    Attributes:
        text: its text.
        source_bytes: the bytes of the input file it was read from.
    """

    text: str
    source_bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# Reading documents
# ---------------------------------------------------------------------------------------------------------------------


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


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose documents; :func:`corpus_from_arguments` reads them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="text files, JSON-lines files and folders of them")
    source.add_argument(
        "--python-corpus",
        action="store_true",
        help="source and documentation of the running Python and its installed packages",
    )
    parser.add_argument(
        "--suffixes",
        nargs="+",
        metavar=".EXT",
        help=f"files taken from a folder (default {' '.join(FOLDER_SUFFIXES)}) "
        f"or by --python-corpus (default {' '.join(PYTHON_SUFFIXES)})",
    )
    parser.add_argument("--json-key", metavar="KEY", help="where a JSON line holds its text (default text)")
    parser.add_argument(
        "--max-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="read at most this much, e.g. 20MB: the first of --input, or an even choice of --python-corpus",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="read at most this many documents")


def corpus_from_arguments(arguments: argparse.Namespace) -> Corpus:
    """Return the corpus that the options of :func:`add_corpus_arguments` choose.

    Raises:
        UsageError: when an input does not exist, an option has no effect on the inputs, or no file is left.
    """
    folders = arguments.python_corpus or any(map(os.path.isdir, arguments.input))
    if arguments.suffixes and not folders:
        raise UsageError("--suffixes has no effect on single files; give a folder or leave it out")
    if arguments.python_corpus:
        paths = python_corpus_paths(max_bytes=arguments.max_bytes, suffixes=arguments.suffixes or PYTHON_SUFFIXES)
    else:
        paths = find_files(arguments.input, arguments.suffixes or FOLDER_SUFFIXES)
    if not paths:
        raise UsageError("no file of the running Python is left; raise --max-bytes or name other --suffixes")
    if arguments.json_key is not None and not any(path.suffix in JSON_LINES_SUFFIXES for path in paths):
        raise UsageError(f"--json-key {arguments.json_key} has no effect without a JSON-lines file; leave it out")
    return Corpus(paths, arguments.json_key or "text", arguments.max_bytes, arguments.limit)


def parse_bytes(text: str) -> int:
    """Read a size such as ``4096``, ``20MB`` or ``1.5G`` (powers of 1000).

    Raises:
        argparse.ArgumentTypeError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 4096, 20MB or 1.5G, say")
    return size


def positive_int(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Writing a prefix
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusSummary:
    """What :func:`write_corpus` wrote.

    Attributes:
        documents: number of documents written.
        empty: number of documents without text, which are left out.
        tokens: number of tokens, end-of-document tokens included.
        text_bytes: size of the text in UTF-8.
        seconds: time it took.
        files: the files written.
    """

    documents: int
    empty: int
    tokens: int
    text_bytes: int
    seconds: float
    files: tuple[Path, Path]


def write_corpus(
    documents: Iterable[Document],
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    append_eod: bool = True,
    overwrite: bool = False,
    total_bytes: int | None = None,
) -> CorpusSummary:
    """Tokenize documents into ``prefix.bin`` and ``prefix.idx``, in Megatron's indexed format.

    Token ids are stored as uint16 where the vocabulary allows, else as int32. The files are the same for any number
    of workers, and appear only when they are whole. Progress goes to the standard error output.

    Args:
        documents: the documents; those without text are left out.
        prefix: path of the files without their suffix; missing folders are made.
        tokenizer: it encodes the text.
        workers: number of tokenizing processes; 1 tokenizes in this process.
        append_eod: end each document with the end-of-document token.
        overwrite: replace files that exist.
        total_bytes: sum of ``source_bytes`` over the documents, for the progress bar.

    Raises:
        UsageError: when a file exists and ``overwrite`` is off, cannot be written, or no document has text.
    """
    files = prefix_files(prefix)
    for path in files:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; pass --overwrite to replace it or choose another --output-prefix")
    written = empty = tokens = text_bytes = 0
    encoder = _Encoder(tokenizer, append_eod)
    with _open_builder(files, tokenizer.vocab_size) as builder, _progress(total_bytes) as progress:
        started = time.monotonic()
        for batch in _encode_in_order(_batches(documents), encoder, workers):
            for document in np.split(batch.tokens, np.cumsum(batch.lengths[:-1])) if batch.lengths else ():
                builder.add_document(document, [len(document)])
            written += len(batch.lengths)
            empty += batch.empty
            tokens += len(batch.tokens)
            text_bytes += batch.text_bytes
            progress.advance(len(batch.lengths), batch.source_bytes)
        if not written:
            raise UsageError("the input holds no document with text; check --input and --json-key")
    return CorpusSummary(written, empty, tokens, text_bytes, time.monotonic() - started, files)


@contextmanager
def _open_builder(files: tuple[Path, Path], vocab_size: int) -> Iterator[Any]:
    """Open Megatron's writer on temporary names; the files get their own names once all is written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    bin_path, idx_path = files
    bin_temporary, idx_temporary = (path.with_name(f"{path.name}.tmp") for path in files)
    try:
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(bin_temporary), dtype=DType.optimal_dtype(vocab_size))
    except OSError as error:
        raise UsageError(f"{bin_path} cannot be written: {error.strerror}; choose another --output-prefix") from error
    try:
        yield builder
        builder.finalize(str(idx_temporary))
        # An old index must never stand beside new data.
        idx_path.unlink(missing_ok=True)
        os.replace(bin_temporary, bin_path)
        os.replace(idx_temporary, idx_path)
    finally:
        builder.data_file.close()
        bin_temporary.unlink(missing_ok=True)
        idx_temporary.unlink(missing_ok=True)


class _Encoded(NamedTuple):
    """A batch of documents in tokens: int32 ``tokens`` end to end, and the length of each document."""

    tokens: NDArray[np.int32]
    lengths: list[int]
    empty: int
    text_bytes: int
    source_bytes: int


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    append_eod: bool

    def __call__(self, batch: list[Document]) -> _Encoded:
        tokens: list[int] = []
        lengths: list[int] = []
        for document in batch:
            ids = self.tokenizer.encode(document.text)
            if not ids:
                continue
            if self.append_eod:
                ids.append(self.tokenizer.eod)
            tokens += ids
            lengths.append(len(ids))
        return _Encoded(
            tokens=np.array(tokens, dtype=np.int32),
            lengths=lengths,
            empty=len(batch) - len(lengths),
            text_bytes=sum(len(document.text.encode()) for document in batch),
            source_bytes=sum(document.source_bytes for document in batch),
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches worth sending to another process."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_in_order(batches: Iterable[list[Document]], encoder: _Encoder, workers: int) -> Iterator[_Encoded]:
    """Encode batches in worker processes, in the order given and with few of them in memory at a time."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: deque[Future[_Encoded]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # An interrupt from the keyboard reaches the parent as well, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent dies: a killed parent cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: list[Document]) -> _Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(batch)


class _Progress:
    """Counts documents and bytes, and prints a line now and then."""

    def __init__(self) -> None:
        self.documents = 0
        self.source_bytes = 0
        self._started = self._printed = time.monotonic()

    def advance(self, documents: int, source_bytes: int) -> None:
        self.documents += documents
        self.source_bytes += source_bytes
        self._show()

    def _show(self) -> None:
        if time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(self.describe(), file=sys.stderr, flush=True)

    def describe(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        megabytes = self.source_bytes / 1e6
        return (
            f"{self.documents:,} documents, {megabytes:,.1f} MB "
            f"({self.documents / seconds:,.0f} documents/s, {megabytes / seconds:,.1f} MB/s)"
        )


class _ProgressBar(_Progress):
    """The same as a bar on a terminal."""

    def __init__(self, bar: Any, total_bytes: int | None) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task("", total=total_bytes)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.source_bytes, description=self.describe())


@contextmanager
def _progress(total_bytes: int | None) -> Iterator[_Progress]:
    if not sys.stderr.isatty():
        yield _Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _ProgressBar(bar, total_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Checking a prefix
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixInfo:
    """What the index of a checked prefix says.

    Attributes:
        prefix: path of the files without their suffix.
        num_documents: number of documents.
        num_sequences: number of sequences; Megatron draws samples from these. A document is one sequence, unless the
            files come from a tool that splits sentences.
        num_tokens: number of tokens.
        dtype: how the ``.bin`` stores a token id.
        digest: hash of the sequence lengths, on which all the indices that Megatron caches depend.
    """

    prefix: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    dtype: np.dtype[Any]
    digest: str

    def sequence_lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every sequence, mapped from the file: int32, shape [num_sequences]."""
        return _map_array(prefix_files(self.prefix)[1], "<i4", _HEADER.size, self.num_sequences)


def prefix_files(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of the ``.bin`` and the ``.idx`` of a prefix.

    Raises:
        UsageError: when the prefix ends in one of these suffixes, or in a separator.
    """
    name = os.fspath(prefix)
    if name.endswith((".bin", ".idx")):
        raise UsageError(f"{name} is a file of a data prefix; give the prefix alone, {name[:-4]}")
    if not name or name.endswith(os.sep):
        raise UsageError(f"data prefix {name!r} names no file; give the path of the .bin without its suffix")
    return Path(f"{name}.bin"), Path(f"{name}.idx")


def check_prefix(prefix: str | os.PathLike[str]) -> PrefixInfo:
    """Check that ``prefix.bin`` and ``prefix.idx`` are whole and belong together.

    Sizes are compared before anything is read by them, so a damaged or hostile index costs no memory. Token ids are
    left to :func:`check_vocabulary`.

    Raises:
        UsageError: naming the file, when one is missing, truncated, of another format, or does not fit the other.
    """
    bin_path, idx_path = prefix_files(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UsageError(f"{path} does not exist; a data prefix stands for a .bin and an .idx file")
    try:
        dtype, sequences, boundaries = _read_header(idx_path)
        tokens, digest = _check_sequences(idx_path, sequences, dtype.itemsize)
        _check_boundaries(idx_path, sequences, boundaries)
        bin_size = bin_path.stat().st_size
    except OSError as error:
        raise UsageError(f"data prefix {prefix} cannot be read: {error.strerror}; check the files") from error
    if bin_size != tokens * dtype.itemsize:
        raise UsageError(
            f"{bin_path} holds {bin_size} bytes where {idx_path} tells of {tokens * dtype.itemsize}; "
            "one of them is truncated or of another corpus, preprocess it again"
        )
    if not tokens:
        raise UsageError(f"{bin_path} holds no tokens; preprocess a corpus with text")
    return PrefixInfo(os.fspath(prefix), boundaries - 1, sequences, tokens, dtype, digest)


def check_vocabulary(prefix: str | os.PathLike[str], vocab_size: int, *, full_scan_bytes: int = 256_000_000) -> int:
    """Check that the token ids of a prefix are below ``vocab_size``.

    All of a ``.bin`` of up to ``full_scan_bytes`` is read. Of a larger one as much is read in evenly spaced
    stretches, its head and tail among them: this finds a corpus of another tokenizer, not every single bad token.

    Returns:
        The largest token id seen.

    Raises:
        UsageError: as :func:`check_prefix`, and when a token id is negative or not below ``vocab_size``.
    """
    info = check_prefix(prefix)
    bin_path, _ = prefix_files(prefix)
    tokens = _map_array(bin_path, info.dtype, 0, info.num_tokens)
    largest = -1
    for start in _scan_starts(info.num_tokens, full_scan_bytes // info.dtype.itemsize):
        stretch = tokens[start : start + _CHECK_CHUNK]
        low, high = int(stretch.min()), int(stretch.max())
        if low < 0 or high >= vocab_size:
            raise UsageError(
                f"{bin_path} holds token id {low if low < 0 else high}, outside a vocabulary of {vocab_size}; "
                "give the tokenizer it was preprocessed with, or preprocess it again"
            )
        largest = max(largest, high)
    return largest


def _scan_starts(num_tokens: int, full_scan_tokens: int) -> Iterable[int]:
    """Return where the stretches of ``_CHECK_CHUNK`` tokens to look at begin."""
    if num_tokens <= max(full_scan_tokens, _CHECK_CHUNK):
        return range(0, num_tokens, _CHECK_CHUNK)
    stretches = max(2, full_scan_tokens // _CHECK_CHUNK)
    last = num_tokens - _CHECK_CHUNK
    return [last * number // (stretches - 1) for number in range(stretches)]


def _read_header(idx_path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return the token dtype, the number of sequences and the number of document boundaries."""
    with idx_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
        raise UsageError(f"{idx_path} is not an index of Megatron's format (bad magic); preprocess the corpus again")
    if len(header) < _HEADER.size:
        raise UsageError(f"{idx_path} is truncated within its header; preprocess the corpus again")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _TOKEN_DTYPES:
        raise UsageError(
            f"{idx_path} has version {version} and dtype code {code}, where version 1 and an integer dtype are read; "
            "preprocess the corpus again"
        )
    expected = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    size = idx_path.stat().st_size
    if size != expected or boundaries < 1:
        raise UsageError(
            f"{idx_path} holds {size} bytes where its header tells of {expected}; it is truncated or damaged, "
            "preprocess the corpus again"
        )
    return np.dtype(_TOKEN_DTYPES[code]), sequences, boundaries


def _check_sequences(idx_path: Path, sequences: int, itemsize: int) -> tuple[int, str]:
    """Check that the sequences follow each other; return their tokens together and the hash of their lengths."""
    all_lengths = _map_array(idx_path, "<i4", _HEADER.size, sequences)
    all_offsets = _map_array(idx_path, "<i8", _HEADER.size + 4 * sequences, sequences)
    digest = hashlib.sha256()
    tokens = 0
    for start in range(0, sequences, _CHECK_CHUNK):
        lengths = all_lengths[start : start + _CHECK_CHUNK]
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0 or not np.array_equal(
            all_offsets[start : start + _CHECK_CHUNK], (ends - lengths) * itemsize
        ):
            raise UsageError(f"{idx_path} is damaged: its sequences overlap or leave gaps; preprocess the corpus again")
        digest.update(lengths.tobytes())
        tokens = int(ends[-1])
    return tokens, digest.hexdigest()


def _check_boundaries(idx_path: Path, sequences: int, count: int) -> None:
    """Check that the document boundaries rise from the first sequence to the last."""
    boundaries = _map_array(idx_path, "<i8", _HEADER.size + 12 * sequences, count)
    ends = boundaries[0] == 0 and boundaries[-1] == sequences
    # Neighbouring chunks share an element, so that every step is looked at.
    steps = (boundaries[start : start + _CHECK_CHUNK + 1] for start in range(0, count, _CHECK_CHUNK))
    if not ends or any(bool((chunk[1:] < chunk[:-1]).any()) for chunk in steps):
        raise UsageError(f"{idx_path} is damaged: its document boundaries do not rise; preprocess the corpus again")


def _map_array(path: Path, dtype: str | np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    """Map part of a file whose size is known to suffice."""
    if not count:  # numpy refuses to map nothing
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
