"""Recognizing the format of an input by its first bytes; its name only settles what they leave open."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from megatron_hyperp.data.streams import COMPRESSED_SUFFIXES, compression_of

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
# What a file can also be read as, if the user asks for it.
READABLE_AS = {
    "text": ("text", "jsonl", "json", "csv", "tsv"),
    "json": ("json", "jsonl"),
    **{name: (name,) for name in ("jsonl", "csv", "tsv", "parquet")},
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
# Those with a header.
COLUMNS = (*DELIMITERS, "parquet")
_BY_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
# Formats that hold no text, or hold it in a way that is not read: what they begin with.
_BINARY = {
    b"%PDF-": "PDF",
    b"PK\x03\x04": "zip",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"{\\rtf": "RTF",
    b"\x7fELF": "ELF",
    b"SQLite format 3\0": "SQLite",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "NumPy",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow stream",
    b"PARE": "encrypted Parquet",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"MMIDIDX\0": "Megatron index",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "RAR",
    b"\x04\x22\x4d\x18": "lz4",
}
_LFS = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = "a Git LFS pointer"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))
# Lines and rows that are looked at.
_SAMPLE = 20


class Detected(NamedTuple):
    """What an input was recognized as.

    Attributes:
        format: one of ``FORMATS``; empty for what is not read.
        reason: why it is not read, for example ``binary (PDF)``.
        keys: those of the one JSON object that is all of the input and has no text under the key asked for: a record
            with its text elsewhere, or metadata.
    """

    format: str = ""
    reason: str = ""
    keys: tuple[str, ...] | None = None


def detect(head: bytes, *, head_is_all: bool, path: PurePath, key: str) -> Detected:
    """Recognize the format of an input.

    Args:
        head: the beginning of its decompressed content.
        head_is_all: there is no more content.
        path: of the input. Its suffix decides where the content has no mark of its own (CSV), and makes a damaged file
            one of the format that it is named after, which its reader refuses.
        key: where records hold their text; a CSV file is recognized by it without a suffix.
    """
    if head_is_all and not head.strip():
        return Detected(reason="empty")
    if head.startswith(_LFS):
        return Detected(reason=LFS_POINTER)
    if head.startswith(b"PAR1"):
        return Detected("parquet")
    if kind := _binary(head):
        return Detected(reason=kind)
    text = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode(head, final=head_is_all)
    named = _BY_SUFFIX.get(uncompressed_suffix(path), "text")
    if kind := _json_kind(text, head_is_all):
        return Detected(kind, keys=_keys_of_lone_object(text, key) if head_is_all else None)
    tables = (kind for kind, delimiter in DELIMITERS.items() if _is_table(text, head_is_all, delimiter, key))
    return Detected(next(tables, named))


def uncompressed_suffix(path: PurePath) -> str:
    """Return the suffix in lower case, the one before it for ``.gz`` and the like."""
    suffix = path.suffix.lower()
    return PurePath(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _binary(head: bytes) -> str:
    """Return what kind of binary data this is; empty for text."""
    for magic, name in _BINARY.items():
        if head.startswith(magic):
            return f"binary ({name})"
    if head[257:262] == b"ustar":
        return "binary (tar)"
    if compression := compression_of(head):
        return f"compressed twice ({compression})"
    if head.startswith(_UTF16):
        return ""  # text, which its reader refuses
    if b"\0" in head:
        return "binary"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        # Text in another encoding, which its reader refuses, has hardly any control characters.
        if len(head) - len(head.translate(None, _CONTROLS)) > len(head) // 100:
            return "binary"
    return ""


def _json_kind(text: str, is_all: bool) -> str:
    """Return ``jsonl``, ``json`` or an empty string."""
    lines = list(_complete_lines(text, is_all))
    objects = [isinstance(_parse(line), dict) for line in lines]
    if any(objects[:1]) or 2 * sum(objects) > len(lines):
        return "jsonl"
    if not lines and re.match(r'\s*\{\s*"', text):
        return "jsonl"  # a first line longer than the head
    if re.match(r'\s*(\{\s*["}]|\[\s*(\{\s*["}]|"))', text):
        return "json"
    return "json" if is_all and isinstance(_parse(text), list) else ""


def _complete_lines(text: str, is_all: bool) -> Iterator[str]:
    """Yield the first lines that are not blank."""
    lines = text.split("\n")
    if not is_all:
        lines.pop()
    yield from [line for line in lines if line.strip()][:_SAMPLE]


def _parse(text: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _keys_of_lone_object(text: str, key: str) -> tuple[str, ...] | None:
    value = _parse(text)
    return tuple(value) if isinstance(value, dict) and key not in value else None


def _is_table(text: str, is_all: bool, delimiter: str, key: str) -> bool:
    """Whether there are two columns or more, one of them named ``key``, with a value in every row."""
    lines = [f"{line}\n" for line in text.split("\n")]
    reader = csv.reader(lines if is_all else lines[:-1], delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a row that the head cuts off, or no table
        for row in itertools.islice(reader, _SAMPLE):
            if row:
                rows.append(row)
    return len(rows) > 1 and len(rows[0]) > 1 and key in rows[0] and all(len(row) == len(rows[0]) for row in rows)
