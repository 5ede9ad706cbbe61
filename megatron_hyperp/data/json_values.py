"""Parsing a JSON file that is larger than memory, one value at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_hyperp.data.streams import LONGEST_DOCUMENT, Stream
from megatron_hyperp.errors import UsageError

_CHUNK = 2**20
# A parser that meets the end of what has been read complains at most so many characters before it (two \uXXXX).
_NEAR_END = 16


class JsonValue(NamedTuple):
    """A value of a JSON file.

    Attributes:
        value: what was parsed.
        line: where it begins, from 1.
        size: its length in bytes.
    """

    value: Any
    line: int
    size: int


def json_values(stream: Stream) -> Iterator[JsonValue]:
    """Yield the values of a JSON file: those in an array, or values that follow each other.

    Bytes that are not UTF-8 become surrogates (``surrogateescape``).

    Raises:
        UsageError: for what is not JSON, or a value of more than ``LONGEST_DOCUMENT`` characters.
    """
    parser = _Parser(stream)
    while following := parser.peek():
        if following != "[":
            yield parser.value()
            continue
        parser.skip("[")
        if parser.peek() != "]":
            yield parser.value()
            while parser.peek() == ",":
                parser.skip(",")
                yield parser.value()
        parser.skip("]")


class _Parser:
    """Text that has been read and not parsed, from ``_at`` in ``_buffer``."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._to_value = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is not white space; an empty string at the end."""
        while True:
            rest = len(self._buffer) - self._at
            while rest and self._buffer[self._at] in " \t\r\n":
                self._advance(self._at + 1)
                rest -= 1
            if rest or self._ended:
                return self._buffer[self._at] if rest else ""
            self._read_on()

    def skip(self, character: str) -> None:
        """Pass a character that must follow."""
        found = self.peek()
        if found != character:
            self._refuse(f"{character} expected, not {found or 'the end'}", self._at)
        self._advance(self._at + 1)

    def value(self) -> JsonValue:
        """Parse the value that follows."""
        self.peek()
        while True:
            try:
                value, end = self._to_value.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self._buffer) - _NEAR_END and not error.msg.startswith("Unterminated string")
                if whole or self._ended:
                    self._refuse(error.msg, error.pos)
            except (RecursionError, ValueError) as error:  # nested too deeply, a number of too many digits
                self._refuse(str(error), self._at)
            else:
                if end < len(self._buffer) or self._ended:  # else a number may continue
                    size = len(self._buffer[self._at : end].encode("utf-8", "surrogateescape"))
                    parsed = JsonValue(value, self._line, size)
                    self._advance(end)
                    return parsed
            self._read_on()

    def _advance(self, at: int) -> None:
        self._line += self._buffer.count("\n", self._at, at)
        self._at = at

    def _read_on(self) -> None:
        """Read as much as is held, so that a long value is parsed a few times only."""
        held = self._buffer[self._at :]
        if len(held) > LONGEST_DOCUMENT:
            raise UsageError(f"{self._stream.name}:{self._line} holds a value of more than {LONGEST_DOCUMENT:,} bytes")
        content = self._stream.data.read(max(_CHUNK, len(held)))
        self._ended = not content
        self._buffer, self._at = held + self._to_text.decode(content, final=self._ended), 0

    def _refuse(self, problem: str, at: int) -> None:
        line = self._line + self._buffer.count("\n", self._at, at)
        where = f"{self._stream.name}:{line}"
        raise UsageError(f"{where} is not JSON ({problem}); correct the file, or read it as text with --format text")
