"""Megatron's indexed format: writing a corpus to it, and the checks before such files are read.

A corpus on disk is a prefix: ``PREFIX.bin`` holds the token ids of all documents, ``PREFIX.idx`` where each begins.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hyperp.data import settings
from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.encoding import encode
from megatron_hyperp.data.tokenizer import Tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.progress import ProgressBar

# The .idx file: magic, version, dtype code, number of sequences, number of document boundaries; then the length of
# every sequence (int32), its byte offset in the .bin (int64), and the document boundaries (int64).
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHECK_CHUNK = 2**20


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
    prepend_bos: bool = False,
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
        prepend_bos: begin each document with the beginning-of-sequence token; ``prefix.settings.json`` records it.
        overwrite: replace files that exist.
        total_bytes: sum of ``source_bytes`` over the documents, for the progress lines.

    Raises:
        UsageError: when a file exists and ``overwrite`` is off, cannot be written, no document has text, or the
            tokenizer has no beginning-of-sequence token to begin documents with.
    """
    files = prefix_files(prefix)
    for path in files:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; pass --overwrite to replace it or choose another --output-prefix")
    written = empty = tokens = text_bytes = 0
    made = settings.CorpusSettings(prepend_bos=prepend_bos)
    with _open_builder(files, tokenizer.vocab_size, made) as builder, _Progress(total_bytes) as progress:
        started = time.monotonic()
        for batch in encode(documents, tokenizer, append_eod=append_eod, prepend_bos=prepend_bos, workers=workers):
            for document in batch.documents:
                builder.add_document(document, [len(document)])
                tokens += len(document)
            written += len(batch.documents)
            empty += batch.empty
            text_bytes += batch.text_bytes
            progress.advance(len(batch.documents), batch.source_bytes)
        if not written:
            raise UsageError("the input holds no document with text; check --input and --json-key")
    return CorpusSummary(written, empty, tokens, text_bytes, time.monotonic() - started, files)


@contextmanager
def _open_builder(files: tuple[Path, Path], vocab_size: int, made: settings.CorpusSettings) -> Iterator[Any]:
    """Open Megatron's writer on temporary names; the files get their own names once all is written."""
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
        # An old index or old checksums must never accompany new data, and new data must have its settings.
        idx_path.unlink(missing_ok=True)
        checksums_file(bin_path).unlink(missing_ok=True)
        settings.write(bin_path, made)
        os.replace(bin_temporary, bin_path)
        os.replace(idx_temporary, idx_path)
    finally:
        builder.data_file.close()
        bin_temporary.unlink(missing_ok=True)
        idx_temporary.unlink(missing_ok=True)


class _Progress(ProgressBar):
    """Counts documents and bytes of input, and shows them."""

    def __init__(self, total_bytes: int | None) -> None:
        super().__init__(total_bytes, self._in_words)
        self._total_bytes = total_bytes
        self._documents = 0
        self._source_bytes = 0

    def __enter__(self) -> _Progress:
        super().__enter__()
        return self

    def advance(self, documents: int, source_bytes: int) -> None:
        self._documents += documents
        self._source_bytes += source_bytes
        self.update(self._source_bytes)

    def _in_words(self, source_bytes: int, seconds: float) -> str:
        megabytes = source_bytes / 1e6
        whole = f" of {self._total_bytes / 1e6:,.1f}" if self._total_bytes else ""
        return (
            f"{self._documents:,} documents, {megabytes:,.1f}{whole} MB "
            f"({self._documents / seconds:,.0f} documents/s, {megabytes / seconds:,.1f} MB/s)"
        )


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


def checksums_file(bin_path: Path) -> Path:
    """Return where the checksums of a corpus are."""
    return bin_path.with_name(f"{bin_path.name.removesuffix('.bin')}.checksums.json")


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
            raise UsageError(
                f"{path} does not exist; tools/preprocess_data.py makes the .bin and the .idx of a data prefix"
            )
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


def first_token(prefix: str | os.PathLike[str]) -> int:
    """Return the first token of a corpus. Raises: as :func:`check_prefix`."""
    info = check_prefix(prefix)
    return int(_map_array(prefix_files(prefix)[0], info.dtype, 0, 1)[0])


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
