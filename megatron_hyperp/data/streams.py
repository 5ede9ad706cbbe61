"""Opening an input: a file, a pipe or standard input, decompressed where its first bytes say so."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from megatron_hyperp.errors import UsageError

STANDARD_INPUT = Path("-")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# How much of the content is looked at to recognize its format.
HEAD_BYTES = 2**18
# Compressed bytes that are decompressed at a time: few, because hostile data can grow 30,000 times.
_PIECE = 2**12
_BUFFER = 2**20
# Bytes of one document at most: more is a file that was not recognized, or hostile compressed data.
LONGEST_DOCUMENT = 2**30
# The window of `zstd --long=31`, which some large corpora are published with.
ZSTD_WINDOW = 2**31
XZ_MEMORY = 2**30


class _Decompressor(Protocol):
    """Decompresses one member (gzip), stream (bzip2, xz) or frame (zstd)."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _ZstdFrame:
    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UsageError("zstd needs the package zstandard; pip install 'megatron-hyperp[data]'") from error
        self._error: type[Exception] = zstandard.ZstdError
        self._frame: Any = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)

    def decompress(self, data: bytes, /) -> bytes:
        try:
            return bytes(self._frame.decompress(data))
        except self._error as error:
            raise ValueError(str(error)) from error


class _Compression(NamedTuple):
    magic: tuple[bytes, ...]
    decompressor: Callable[[], _Decompressor]


# Magic numbers: RFC 1952, bzip2 and its first block or its end, the .xz file format, RFC 8878 (a file may begin with
# one of 16 skippable frames).
_COMPRESSIONS = {
    "gzip": _Compression((b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    "bzip2": _Compression(
        tuple(b"BZh%d" % n + block for n in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")), bz2.BZ2Decompressor
    ),
    "xz": _Compression((b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)),
    "zstd": _Compression((b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))), _ZstdFrame),
}
_MAGIC_BYTES = 10


def compression_of(head: bytes) -> str:
    """Return how content that begins with these bytes is compressed: gzip, bzip2, xz, zstd, or an empty string."""
    return next((name for name, kind in _COMPRESSIONS.items() if head.startswith(kind.magic)), "")


class Stream:
    """An open input, to be read once from beginning to end; a context manager.

    Attributes:
        name: what messages call it.
        compression: as of :func:`compression_of`.
        head: the first ``HEAD_BYTES`` of the decompressed content; shorter only where the content is.
        data: all of the decompressed content, ``head`` included.
    """

    def __init__(self, path: Path) -> None:
        """Open an input and read its head.

        Args:
            path: a file, a pipe, or ``-`` for standard input.

        Raises:
            OSError: when it cannot be read.
            UsageError: when compressed data is damaged, or needs a package that is not installed.
        """
        self.name = name_of(path)
        self._file = _CountedFile(path)
        try:
            first = _read_fully(self._file, _MAGIC_BYTES)
            self.compression = compression_of(first)
            content: io.RawIOBase = _Joined(first, self._file)
            if self.compression:
                content = _Decompressed(io.BufferedReader(content, _BUFFER), self.name, self.compression)
            self.head = _read_fully(content, HEAD_BYTES)
        except BaseException:
            self._file.close()
            raise
        self.data = io.BufferedReader(_Joined(self.head, content), _BUFFER)

    @property
    def consumed(self) -> int:
        """Bytes read so far, counted as they are in the file."""
        return self._file.count

    @consumed.setter
    def consumed(self, count: int) -> None:
        self._file.count = count

    @property
    def head_is_all(self) -> bool:
        """Whether ``head`` is all of the content."""
        return len(self.head) < HEAD_BYTES

    @property
    def size(self) -> int:
        """Bytes of the file; 0 for a pipe."""
        return os.fstat(self._file.fileno()).st_size

    def seekable_file(self) -> io.RawIOBase | None:
        """Return the file at its beginning; None where it is compressed or cannot be seeked."""
        if self.compression or not self._file.seekable():
            return None
        self._file.seek(0)
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def name_of(path: Path) -> str:
    """Return what messages call an input."""
    return "standard input" if path == STANDARD_INPUT else os.fspath(path)


class _CountedFile(io.FileIO):
    """A file that counts the bytes that are read with ``readinto``."""

    def __init__(self, path: Path) -> None:
        standard = path == STANDARD_INPUT
        super().__init__(0 if standard else path, "rb", closefd=not standard)
        self.count = 0

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self.count += count
        return count


class _Joined(io.RawIOBase):
    """Bytes that were read already, then the rest."""

    def __init__(self, first: bytes, rest: io.RawIOBase) -> None:
        self._first = memoryview(first)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._first:
            return self._rest.readinto(buffer) or 0
        count = min(len(buffer), len(self._first))
        buffer[:count] = self._first[:count]
        self._first = self._first[count:]
        return count


class _Decompressed(io.RawIOBase):
    """The content of all members of a compressed file.

    The file objects of bz2, lzma and zstandard are not used: the first two ignore what follows a stream and is none
    itself, the third ends without an error where a frame is cut off.
    """

    def __init__(self, source: io.BufferedReader, name: str, compression: str) -> None:
        self._source = source
        self._name = name
        self._compression = compression
        self._new_member = _COMPRESSIONS[compression].decompressor
        self._member = self._new_member()
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._content:
            piece = self._next_piece()
            if not piece:
                return 0
            try:
                self._content = memoryview(self._member.decompress(piece))
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise UsageError(
                    f"{self._name} is damaged: its {self._compression} data cannot be read ({error}); "
                    "copy or download it again"
                ) from error
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _next_piece(self) -> bytes:
        """Return compressed bytes for ``self._member``; none at the end of the last member."""
        if not self._member.eof:
            if piece := self._source.read(_PIECE):
                return piece
            raise UsageError(
                f"{self._name} is truncated: its {self._compression} data ends in the middle; copy or download it again"
            )
        # Members may be padded with zeros (gzip on tapes, xz).
        piece = self._member.unused_data.lstrip(b"\0")
        while not piece:
            block = self._source.read(_PIECE)
            if not block:
                return b""
            piece = block.lstrip(b"\0")
        self._member = self._new_member()
        return piece


def _read_fully(source: io.RawIOBase, size: int) -> bytes:
    """Read ``size`` bytes, or all where there are fewer; a pipe gives what it has, in pieces."""
    content = bytearray(size)
    count = 0
    while count < size and (more := source.readinto(memoryview(content)[count:])):
        count += more
    return bytes(content[:count])
