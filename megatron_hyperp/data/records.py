"""Reading the records of an input: one reader for each format, which holds a record or a chunk in memory."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_hyperp.data.formats import DELIMITERS
from megatron_hyperp.data.json_values import json_values
from megatron_hyperp.data.parquet import read_column
from megatron_hyperp.data.streams import LONGEST_DOCUMENT, Stream
from megatron_hyperp.errors import UsageError

_PIECE = 2**20
_KEYS_SHOWN = 20


class Record(NamedTuple):
    """One record of an input.

    Attributes:
        text: its text; empty where there is a fault.
        size: the bytes of decompressed input that it takes; of a Parquet file those of the text.
        fault: why it has no text, beginning with the file and the line or row; empty for a sound record.
    """

    text: str
    size: int
    fault: str = ""


def read_records(stream: Stream, kind: str, key: str) -> Iterator[Record]:
    """Read all records of an input.

    Args:
        stream: the input, at its beginning.
        kind: its format, one of ``FORMATS``.
        key: where a record holds its text. A text file is one record, without a key.

    Raises:
        OSError: when the input cannot be read.
        UsageError: when it cannot be read to its end: truncated or damaged data, no such column, a document of more
            than ``LONGEST_DOCUMENT`` bytes.
    """
    if kind in DELIMITERS:
        return _read_table(stream, key, DELIMITERS[kind])
    readers: dict[str, Callable[[Stream, str], Iterator[Record]]] = {
        "text": _read_text,
        "jsonl": _read_json_lines,
        "json": _read_json,
        "parquet": _read_parquet,
    }
    return readers[kind](stream, key)


def _read_text(stream: Stream, _: str) -> Iterator[Record]:
    content = bytearray()
    while piece := stream.data.read(_PIECE):  # a read of LONGEST_DOCUMENT would allocate as much at once
        content += piece
        if len(content) > LONGEST_DOCUMENT:
            raise _too_long(stream.name, "a text file is one document: split it, or make it JSON lines")
    yield _record(bytes(content), stream.name, len(content))


def _read_json_lines(stream: Stream, key: str) -> Iterator[Record]:
    number = 0
    while line := stream.data.readline(LONGEST_DOCUMENT + 1):
        number += 1
        where = f"{stream.name}:{number}"
        if len(line) > LONGEST_DOCUMENT:
            raise _too_long(where, "JSON lines hold one object a line")
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        try:
            fields = json.loads(content.decode())
        except UnicodeDecodeError as error:
            yield Record("", len(line), f"{where} is not UTF-8 (byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield Record("", len(line), f"{where} is not JSON ({error}); JSON lines hold one object a line")
        else:
            yield _record_of_object(fields, key, where, len(line))


def _read_json(stream: Stream, key: str) -> Iterator[Record]:
    for value in json_values(stream):
        yield _record_of_object(value.value, key, f"{stream.name}:{value.line}", value.size)


def _read_table(stream: Stream, key: str, delimiter: str) -> Iterator[Record]:
    """Read CSV as RFC 4180 has it: a header, double quotes around fields, which may hold line breaks."""
    csv.field_size_limit(LONGEST_DOCUMENT)
    sizes = _Sizes()
    reader = csv.reader(sizes.lines(stream), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where, before = f"{stream.name}:{reader.line_num + 1}", sizes.bytes
        try:
            row = next(reader, None)
        except csv.Error as error:
            fault = f"{where} is not CSV ({error}); quote fields as RFC 4180 describes"
            if header is None:
                raise UsageError(fault) from error
            yield Record("", sizes.bytes - before, fault)
            continue
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if header.count(key) != 1:
                raise UsageError(f"{stream.name} has no column {key!r} ({_listed('columns', header)}); {_OTHER_KEY}")
            place = header.index(key)
        elif len(row) != len(header):
            fault = f"{where} has {len(row)} fields, where the header has {len(header)}"
            yield Record("", sizes.bytes - before, fault)
        else:
            yield _record(row[place], where, sizes.bytes - before)


class _Sizes:
    """Counts the bytes of the lines that a CSV reader takes."""

    def __init__(self) -> None:
        self.bytes = 0

    def lines(self, stream: Stream) -> Iterator[str]:
        first = True
        while line := stream.data.readline(LONGEST_DOCUMENT + 1):
            if len(line) > LONGEST_DOCUMENT:
                raise _too_long(stream.name, "is it CSV?")
            self.bytes += len(line)
            yield (line.removeprefix(codecs.BOM_UTF8) if first else line).decode("utf-8", "surrogateescape")
            first = False


def _read_parquet(stream: Stream, key: str) -> Iterator[Record]:
    for row, value in enumerate(read_column(stream, key), start=1):
        where = f"{stream.name} row {row}"
        if value is None:
            yield Record("", 0, f"{where} has no text under {key!r} (it is null)")
        else:
            yield _record(value, where, len(value))


_OTHER_KEY = "name the one with the text with --json-key"
_TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _record_of_object(fields: Any, key: str, where: str, size: int) -> Record:
    text = fields.get(key) if isinstance(fields, dict) else None
    if isinstance(text, str):
        return _record(text, where, size)
    if not isinstance(fields, dict):
        return Record("", size, f"{where} has no text under {key!r} (it is no object, but {_type_name(fields)})")
    if key in fields:
        return Record("", size, f"{where} has no text under {key!r} (it is {_type_name(text)})")
    return Record("", size, f"{where} has no text under {key!r} ({_listed('keys', sorted(fields))}); {_OTHER_KEY}")


def _type_name(value: Any) -> str:
    return "null" if value is None else _TYPES.get(type(value), "a string")


def _listed(what: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _KEYS_SHOWN else ""
    return f"its {what}: {', '.join(names[:_KEYS_SHOWN])}{more}"


def _record(text: str | bytes, where: str, size: int) -> Record:
    """Return a record of text, which may be bytes, or hold bytes that are not UTF-8 (``surrogateescape``)."""
    try:
        if isinstance(text, bytes):
            return Record(text.decode(), size)
        text.encode()
        return Record(text, size)
    except UnicodeDecodeError as error:
        return Record("", size, f"{where} is not UTF-8 text (byte {error.start}); convert it, with iconv for example")
    except UnicodeEncodeError as error:
        if "\udc80" <= error.object[error.start] <= "\udcff":
            return Record("", size, f"{where} is not UTF-8 text; convert it, with iconv for example")
        return Record("", size, f"{where} holds half a surrogate pair, which is no text; correct the line")


def _too_long(where: str, remedy: str) -> UsageError:
    return UsageError(f"{where} is longer than {LONGEST_DOCUMENT:,} bytes; {remedy}")
