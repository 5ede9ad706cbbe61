"""What is read as what: formats, compressions, ways in, folders, and records without text."""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import struct
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_hyperp.data.arguments import add_corpus_arguments, corpus_from_arguments
from megatron_hyperp.data.corpus import Corpus
from megatron_hyperp.errors import UsageError

TEXTS = ["one", 'two\nlines, "quoted" é', ""]


def open_corpus(*words: object) -> Corpus:
    """The corpus of a command line."""
    parser = argparse.ArgumentParser()
    add_corpus_arguments(parser)
    return corpus_from_arguments(parser.parse_args([*map(str, words)]))


def read(*words: object) -> list[str]:
    """The texts of a command line's corpus."""
    return [document.text for document in open_corpus("--input", *words)]


def json_lines(key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 7, key: text}) + "\n" for text in TEXTS).encode()


def table(dialect: str = "excel", key: str = "text") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, dialect=dialect).writerows([["id", key], *([1, text] for text in TEXTS)])
    return stream.getvalue().encode()


def parquet_file(values: Any = TEXTS, key: str = "text", **options: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(values)), key: values}), stream, **options)
    return stream.getvalue()


OBJECTS = [{"id": 7, "text": text} for text in TEXTS]
CONTENTS: dict[str, bytes] = {
    "jsonl": json_lines(),
    "jsonl, BOM and CRLF": b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n"),
    "json array": json.dumps(OBJECTS).encode(),
    "json array, pretty": b"\xef\xbb\xbf" + json.dumps(OBJECTS, indent=2).encode(),
    "json array, an object a line": ("[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n").encode(),
    "json objects, pretty": "\n".join(json.dumps(fields, indent=2) for fields in OBJECTS).encode(),
    "csv": table(),
    "tsv": table("excel-tab"),
    "parquet": parquet_file(row_group_size=1),
    "parquet, dictionary": parquet_file(pyarrow.array(TEXTS).dictionary_encode()),
    "parquet, large string": parquet_file(pyarrow.array(TEXTS, pyarrow.large_string())),
    "parquet, binary": parquet_file([text.encode() for text in TEXTS]),
}
LONG = "x" * 700_000  # longer than what is looked at


def gz(content: bytes) -> bytes:
    """Without a time stamp: pytest-xdist wants the same names of tests in all its processes."""
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gz,
    "bzip2": bz2.compress,
    "xz": lambda content: lzma.compress(content, preset=0),
    "zstd": zstd,
}


# Formats


@pytest.mark.parametrize(
    "name", ["wiki_00", "a.JSONL", "a.jsonlines", "a.jl", "a.txt", "a.json", "a.csv", "a.gz", "a.py"]
)
@pytest.mark.parametrize("kind", CONTENTS)
def test_content_decides_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[kind])
    assert read(path) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", b'{\n  "text": "one object"\n}\n', ["one object"]),
        ("a", json.dumps({"text": LONG}).encode() + b'\n{"text": "b"}', [LONG, "b"]),
        ("a", json.dumps([{"text": LONG}, {"text": "b" + LONG}], indent=1).encode(), [LONG, "b" + LONG]),
        ("a.csv", b"text\none column\n\n\xe2\x82\xac\n", ["one column", "€"]),
        ("a.csv", b"text,id\n" + LONG.encode() + b",1\n", [LONG]),
        ("a.csv", b'\xef\xbb\xbftext,id\r\n"a\r\nb",1\r\n', ["a\r\nb"]),
        # Text that looks like something else.
        ("a", b"[link](x) and {braces}\n", ["[link](x) and {braces}\n"]),
        ("a.py", b"text, label = 1, 2\nprint(text)\n", ["text, label = 1, 2\nprint(text)\n"]),
        ("a.md", b"PAR, PK, BZhello\n", ["PAR, PK, BZhello\n"]),
        ("a.md", b'Lines:\n\n{"text": "in a document"}\n\nend\n', ['Lines:\n\n{"text": "in a document"}\n\nend\n']),
        ("a.tex", b"{\\it text}\x1b[1m\x0c", ["{\\it text}\x1b[1m\x0c"]),
    ],
)
def test_recognized(tmp_path: Path, name: str, content: bytes, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"%PDF-1.7\n" + bytes(range(200)), r"a\.txt is not text, but binary \(PDF\)"),
        ("a.txt", b"PK\x03\x04\x14\x00", r"binary \(zip\)"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n\0", r"binary \(PNG\)"),
        ("a", struct.pack("<Q", 20) + b'{"a": {"dtype": 1}}', "is not text, but binary"),
        ("a", bytes(range(1, 256)) * 4, "is not text, but binary"),
        ("a", b"x" * 257 + b"ustar  \0", r"binary \(tar\)"),
        ("a", b"ARROW1\0\0", r"binary \(Arrow\)"),
        ("a", gz(gz(b"a")), r"compressed twice \(gzip\)"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"a\.parquet is a Git LFS pointer"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is not UTF-8 text \(byte 0\)"),
        ("a.txt", "caf\u00e9 and more".encode("latin-1"), r"a\.txt is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b"<html>not found</html>\n", r"a\.jsonl:1 is not JSON"),
        ("a.json.gz", gz(b"not JSON\n"), r"a\.json\.gz:1 is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', r"a\.json:2 is not JSON \(Expecting ':' delimiter\)"),
        ("a.json", b'[{"text": "a"}\n', r"a\.json:2 is not JSON \(\] expected, not the end\)"),
        ("a", b'{"text":\n "a"', r"a:2 is not JSON"),
        ("a", b'{\n"text": ' + b"[" * 100_000, "a:1 is not JSON"),
        ("a.json", b'["a", "b"]', r"a\.json:1 has no text under 'text' \(it is no object, but a string\)"),
        ("a.csv", b"id,body\n1,a\n", r"a\.csv has no column 'text' \(its columns: id, body\); name the one"),
        ("a.csv", b"id,text\n1\n", r"a\.csv:2 has 1 fields, where the header has 2"),
        ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', r"a\.csv:3 is not CSV \(unexpected end of data\)"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv:2 is not UTF-8"),
        ("a.parquet", parquet_file(key="body"), r"a\.parquet has no column 'text' \(its columns: id, body\); name"),
        ("a.parquet", parquet_file([1, 2]), r"a\.parquet has no text in column 'text', but int64"),
        ("a.parquet", parquet_file()[:-9], r"a\.parquet cannot be read as Parquet"),
        ("a.parquet", b"text", r"a\.parquet cannot be read as Parquet"),
        ("a", gz(parquet_file()), "a is Parquet in a pipe or compressed"),
        ("a", b" \n", r"nothing to read: skipped 1 \(1 empty: a\)"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "flags", "texts"),
    [
        ("a.jsonl", b'{"text": "a"}\n', ["--format", "text"], ['{"text": "a"}\n']),
        ("a", b"text\none\n", ["--format", "csv"], ["one"]),
        ("a", b"body\tid\none\t1\n", ["--format", "tsv", "--json-key", "body"], ["one"]),
        ("a", b"id,body\n1,one\n", ["--json-key", "body"], ["one"]),
        ("a", json_lines("body"), ["--format", "json", "--json-key", "body"], TEXTS),
        ("a", parquet_file(key="body"), ["--json-key", "body"], TEXTS),
    ],
)
def test_format_and_key(tmp_path: Path, name: str, content: bytes, flags: list[str], texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, *flags) == texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "jsonl"], r"a\.txt:1 is not JSON"),
        (["--format", "parquet"], r"a\.txt cannot be read as Parquet"),
        (["--format", "csv"], r"a\.txt has no column 'text' \(its columns: plain\)"),
    ],
)
def test_a_format_that_is_not_there_is_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text("plain\n")
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.txt", *flags)


# Compressions and ways in


@contextmanager
def way_in(way: str, folder: Path, content: bytes) -> Iterator[str]:
    """Make content available as a file, a pipe, a link of the shell's ``<(...)``, or standard input."""
    if way == "file":
        (folder / "wiki_00").write_bytes(content)
        yield str(folder / "wiki_00")
        return
    if way == "named pipe":
        os.mkfifo(folder / "pipe")
        writer = threading.Thread(target=(folder / "pipe").write_bytes, args=(content,), daemon=True)
        writer.start()
        yield str(folder / "pipe")
        writer.join()
        return
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(into, "wb").write(content), daemon=True)
    kept = os.dup(0)
    writer.start()
    try:
        if way == "standard input":
            os.dup2(out, 0)
        yield "-" if way == "standard input" else f"/dev/fd/{out}"
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(out)
    writer.join()


@pytest.mark.parametrize("way", ["file", "named pipe", "/dev/fd", "standard input"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "json array, pretty", "csv", "text"])
def test_ways_in(tmp_path: Path, kind: str, compression: str, way: str) -> None:
    text = "plain text, as it is\n" * 5000
    with way_in(way, tmp_path, COMPRESS[compression](CONTENTS.get(kind, text.encode()))) as path:
        assert read(path) == ([text] if kind == "text" else TEXTS)


@pytest.mark.parametrize("way", ["named pipe", "standard input"])
def test_what_pipes_cannot_give_is_refused(tmp_path: Path, way: str) -> None:
    refused = {"Parquet in a pipe": parquet_file(), "binary .PDF.": b"%PDF-1", "is not text, but empty": b""}
    for message, content in refused.items():
        folder = tmp_path / message
        folder.mkdir()
        with way_in(way, folder, content) as path, pytest.raises(UsageError, match=message):
            read(path)
    with pytest.raises(UsageError, match=r"standard input .* once"):
        read("-", "-")


MEMBERS: dict[str, Callable[[bytes], bytes]] = {
    **COMPRESS,
    "zstd after a skippable frame": lambda content: struct.pack("<II", 0x184D2A50, 4) + b"size" + zstd(content),
    "zstd without sizes": lambda content: zstandard.ZstdCompressor(write_content_size=False).compress(content),
}
del MEMBERS["none"]


@pytest.mark.parametrize("compression", MEMBERS)
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, compression: str) -> None:
    parts = [f'{{"text": "{number} {os.urandom(3000).hex()}"}}\n'.encode() for number in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(map(MEMBERS[compression], parts)))
    assert read(path) == [json.loads(part)["text"] for part in parts]
    path.write_bytes(path.read_bytes() + bytes(9000))  # padded
    assert len(read(path)) == 40


@pytest.mark.parametrize("compression", MEMBERS)
def test_compressed_data_that_is_not_whole_is_refused(tmp_path: Path, compression: str) -> None:
    content = MEMBERS[compression](b"".join(b'{"text": "%d"}\n' % number for number in range(30_000)))
    path = tmp_path / "a.jsonl"
    damages = [content[: len(content) * fifth // 5] for fifth in range(1, 5)] + [content[:-1], content[:20]]
    damages += [content + content[: len(content) // 2], content + b"garbage", content + b"\0more"]
    if "zstd" not in compression:  # which has no checksum by default
        damages.append(content[:-5] + bytes(byte ^ 255 for byte in content[-5:]))
    for damage in damages:
        path.write_bytes(damage)
        with pytest.raises(UsageError, match=r"a\.jsonl is (truncated|damaged): its \w+ data"):
            read(path)


@pytest.mark.parametrize("compression", COMPRESS)
def test_progress_counts_bytes_as_they_are_in_the_file(tmp_path: Path, compression: str) -> None:
    content = "".join(json.dumps({"text": os.urandom(500).hex()}) + "\n" for _ in range(5000)).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(COMPRESS[compression](content))
    corpus = open_corpus("--input", path)
    steps = [document.source_bytes for document in corpus]
    assert corpus.total_bytes == sum(steps) == path.stat().st_size
    assert max(steps) < path.stat().st_size / 2
    # What limits the corpus does not depend on the compression.
    limited = open_corpus("--input", path, "--max-bytes", "100k")
    assert limited.total_bytes == (100_000 if compression == "none" else None)
    assert len(list(limited)) == 98


def test_progress_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(parquet_file([str(number) for number in range(1000)], row_group_size=100))
    corpus = open_corpus("--input", tmp_path / "a")
    steps = [document.source_bytes for document in corpus]
    assert corpus.total_bytes == sum(steps) == (tmp_path / "a").stat().st_size
    assert max(steps) < 1000


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_files_larger_than_memory_are_streamed(tmp_path: Path, kind: str) -> None:
    line = {"jsonl": b'{"text": "%s"}\n', "json": b'{"text": "%s"},\n', "csv": b"%s,1\n"}[kind] % (b"a" * 50_000)
    begin, end = {"jsonl": (b"", b""), "json": (b"[", b'{"text": ""}]'), "csv": (b"text,id\n", b"")}[kind]
    with gzip.open(tmp_path / "a", "wb", compresslevel=1) as stream:
        stream.write(begin + line * 1000 + end)
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in open_corpus("--input", tmp_path / "a")) == 50_000_000
        assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("package", "content"), [("pyarrow", CONTENTS["parquet"]), ("zstandard", zstd(CONTENTS["jsonl"]))]
)
def test_a_package_that_is_missing_is_named(tmp_path: Path, package: str, content: bytes, monkeypatch: Any) -> None:
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"package {package}; pip install 'megatron-hyperp\[data\]'"):
        read(tmp_path / "a")


# Folders

README = b"# A dataset\n"
INFO = b'{\n  "features": {"text": {"dtype": "string"}}\n}\n'


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


FOLDERS: dict[str, tuple[dict[str, bytes], list[str], list[str], str]] = {
    # files, flags, texts, what is said to be skipped
    "a dataset": (
        {"README.md": README, "dataset_info.json": INFO, ".gitattributes": b"a", ".cache/x.jsonl": CONTENTS["jsonl"],
         "train/00.parquet": CONTENTS["parquet"], "a.png": b"\x89PNG\0"},
        [], TEXTS,
        "skipped 5 (2 hidden: .cache, .gitattributes; 1 JSON without 'text': dataset_info.json; 1 binary (PNG): a.png; "
        "1 plain text next to records: README.md)",
    ),
    "compressed shards": (
        {"README.md": README, "00.jsonl.gz": gz(CONTENTS["jsonl"]), "01.json.zst": zstd(CONTENTS["jsonl"])},
        [], TEXTS * 2, "skipped 1 (1 plain text next to records: README.md)",
    ),
    "many formats, in order": (
        {"b.csv": b"text\nb\n", "a.json": b'[{"text": "a"}]', "c": b'{"text": "c"}\n', "d/e.tsv": b"text\te\nd\t1\n"},
        [], ["a", "b", "c", "d"], "",
    ),
    "text alone": (
        {"b.md": b"b", "a.txt": b"a", "LICENSE": b"l", "empty": b"", "__pycache__/x.txt": b"x"},
        [], ["l", "a", "b"], "skipped 2 (1 cache of Python: __pycache__; 1 empty: empty)",
    ),
    "one object a file": ({"a.json": b'{\n"text": "a"}', "b.json": b'{"text": "b"}', "c.txt": b"c"}, [], ["a", "b"],
        "skipped 1 (1 plain text next to records: c.txt)"),
    "suffixes": (
        {"a.txt": b"a", "b.jsonl": CONTENTS["jsonl"], "c.txt.gz": gz(b"c")},
        ["--suffixes", ".txt"], ["a", "c"],
        "skipped 1 (1 not .txt: b.jsonl)",
    ),
    "text asked for": (
        {"README.md": README, "a.jsonl": b'{"text": "a"}', "b.parquet": CONTENTS["parquet"]}, ["--format", "text"],
        [README.decode(), '{"text": "a"}'], "skipped 1 (1 parquet, not text: b.parquet)",
    ),
    "parquet asked for": (
        {"README.md": README, "a.jsonl": CONTENTS["jsonl"], "b": CONTENTS["parquet"]}, ["--format", "parquet"], TEXTS,
        "skipped 2 (1 jsonl, not parquet: a.jsonl; 1 text, not parquet: README.md)",
    ),
    "json asked for": (
        {"README.md": README, "a.jsonl": CONTENTS["jsonl"], "info.json": INFO}, ["--format", "json"], TEXTS,
        "skipped 2 (1 JSON without 'text': info.json; 1 text, not json: README.md)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, name: str) -> None:
    files, flags, texts, skipped = FOLDERS[name]
    corpus = open_corpus("--input", fill(tmp_path, files), *flags)
    assert [document.text for document in corpus] == texts
    assert corpus.sources.describe().splitlines()[1:] == ([skipped] if skipped else [])


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({"a.png": b"\x89PNG", "b.pdf": b"%PDF-"}, [], r"holds nothing to read: skipped 2 \(1 binary \(PDF\): b\.pdf"),
        ({}, [], "holds nothing to read: it is empty"),
        ({"info.json": INFO}, [], r"nothing to read: skipped 1 .* --json-key .* \(keys of the first: features\)"),
        # The text of these may be in the JSON or in the README.
        ({"README.md": README, "a.json": b'{"body": "a"}', "b.json": b'{"body": "b"}'}, [],
         r"1 plain text and 2 JSON without 'text': choose .* \(keys of the first: body\)"),
        ({"README.md": README, "a.parquet": parquet_file(key="body")}, [], r"a\.parquet has no column 'text'"),
        ({"README.md": README, "a.jsonl": json_lines("body")}, [], r"a\.jsonl:1 has no text under 'text'"),
        ({"README.md": README, "a.parquet": b"version https://git-lfs.github.com/spec/v1\n"}, [], "git lfs pull"),
        ({"README.md": README}, ["--format", "jsonl"], r"skipped 1 \(1 text, not jsonl: README\.md\)"),
        ({"README.md": README}, ["--suffixes", ".jsonl"], r"skipped 1 \(1 not \.jsonl: README\.md\)"),
    ],
)  # fmt: skip
def test_folders_without_text_are_refused(
    tmp_path: Path, files: dict[str, bytes], flags: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(fill(tmp_path, files), *flags)


def test_pipes_and_links_of_folders_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    fill(tmp_path, {"in/a.txt": b"a", "else/b.txt": b"b"})
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "in" / "gone").symlink_to("nothing")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "else" / "b.txt")  # as in the cache of the Hugging Face hub
    corpus = open_corpus("--input", tmp_path / "in")
    assert [document.text for document in corpus] == ["a", "b"]
    skipped = "skipped 3 (2 not a file, or a broken link: gone, pipe; 1 link to a folder: link)"
    assert corpus.sources.describe().splitlines()[1:] == [skipped]


def test_what_is_skipped_is_bounded(tmp_path: Path) -> None:
    files = {f"{number}.{ending}": b"x" for number in range(30) for ending in "abcdefghijklmnopqrst"}
    magics = [b"%PDF-", b"PK\x03\x04", b"\x89PNG", b"GIF8", b"\x7fELF", b"ARROW1", b"ORC", b"Rar!", b"\0", b"PARE"]
    files = {f"{number}": magics[number % 10] + b"x" * 50 for number in range(3000)} | {"text": b"text"}
    described = open_corpus("--input", fill(tmp_path, files)).sources.describe()
    assert len(described) < 600
    assert "skipped 3,000 (300 binary: 1008, 1018, 1028, ...; 300 binary (Arrow)" in described
    assert described.endswith("; 2 more reasons)")


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": b"a", "\x1b[2J\n.pdf": b"%PDF-"})
    assert open_corpus("--input", tmp_path).sources.describe().endswith(r"binary (PDF): \x1b[2J\n.pdf)")


# Records without text

BAD: dict[str, tuple[bytes, str]] = {
    "null": (b'{"text": null}', r"has no text under 'text' \(it is null\)"),
    "number": (b'{"text": 1}', r"has no text under 'text' \(it is a number\)"),
    "list": (b'{"text": ["a"]}', r"has no text under 'text' \(it is a list\)"),
    "no key": (b'{"txt": "a", "id": 1}', r"has no text under 'text' \(its keys: id, txt\); name the one"),
    "no object": (b'["a"]', r"has no text under 'text' \(it is no object, but a list\)"),
    "half a surrogate": (b'{"text": "\\ud800"}', "holds half a surrogate pair"),
    "not JSON": (b'{"text": "a', "is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', r"is not UTF-8 \(byte 10 of the line\)"),
    "nested": (b"[" * 100_000, "is not JSON"),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=rf"a\.jsonl:3 {message}.*; --skip-bad-lines N leaves out"):
        read(path)
    with pytest.raises(UsageError, match=rf"a\.jsonl:5 {message}.* \(bad lines left out before: 1\)"):
        read(path, "--skip-bad-lines", 1)
    corpus = open_corpus("--input", path, "--skip-bad-lines", 2)
    for _ in range(2):  # each reading counts anew
        assert [document.text for document in corpus] == ["a", "b"]
    assert re.search(rf"left out 2 bad lines: \S*a\.jsonl:3 {message}.*a\.jsonl:5", corpus.counts.describe())


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a", b'[{"text": "a"},\n{"text": null},\n1, {"text": "b"}, {}]', "a:2"),
        ("a.csv", b'text,id\na,1\n"x\ny",2,3\n\n"b",1\n\xff,1\nc"c,1\n', r"a\.csv:3"),
        ("a", parquet_file(["a", None, "b", None, None]), "a row 2"),
        ("a", parquet_file(pyarrow.array([b"a", b"\xff", b"b", b"\xc3", b"\xff"])), "a row 2"),
    ],
)
def test_bad_records_of_other_formats(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"/{where} "):
        read(tmp_path / name)
    texts = read(tmp_path / name, "--skip-bad-lines", 3)
    assert texts[:2] == ["a", "b"]
    assert texts[2:] == (['c"c'] if name == "a.csv" else [])


def test_a_text_file_that_is_not_utf8_is_one_bad_line(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": "café".encode("latin-1"), "b.txt": b"b"})
    assert read(tmp_path, "--skip-bad-lines", 1) == ["b"]


# Other inputs


def test_the_python_corpus_is_read_as_it_is() -> None:
    """Also the files that look like JSON or CSV."""
    corpus = open_corpus("--python-corpus", "--max-bytes", "2MB")
    contents = [source.path.read_bytes().decode() for source in corpus.sources.read]
    assert [document.text for document in corpus] == contents
    assert {source.format for source in corpus.sources.read} == {"text"}
    with pytest.raises(UsageError, match="--python-corpus is text"):
        open_corpus("--python-corpus", "--format", "jsonl")
