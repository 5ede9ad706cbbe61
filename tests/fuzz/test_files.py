"""Single files of others, byte by byte: indices, caches, pickles, safetensors, tokenizers, trackers, checksums."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.pickles import load_values
from tests.fuzz import inputs
from tests.fuzz.profiles import fuzzed, run
from tests.fuzz.strategies import EDGES, TEXT, damaged, json_files


def read(name: str, folder: Path, content: bytes) -> None:
    _, reader, refusals = inputs.FILES[name]
    run(name, reader, folder, content, refusals=refusals)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", inputs.FILES)
def test_valid_ones_are_read(folder: Path, name: str) -> None:
    valid, reader, _ = inputs.FILES[name]
    if name in ("tracker", "checksums"):  # of a checkpoint that is not there
        read(name, folder, valid())
    else:
        reader(folder, valid())
    (folder / "checksums.json").unlink(missing_ok=True)


U64 = st.sampled_from([edge for edge in EDGES if 0 <= edge < 2**64])
HEADERS = st.builds(
    lambda magic, version, code, sequences, boundaries, rest: (
        struct.pack("<9sQBQQ", magic, version, code, sequences, boundaries) + rest
    ),
    st.sampled_from([b"MMIDIDX\x00\x00", b"MMIDIDX"]),
    st.sampled_from([1, 1, 1, 0, 2**63]),
    st.integers(0, 255),
    U64,
    U64,
    st.binary(max_size=100),
)


@fuzzed(150)
@given(st.one_of(damaged(inputs.idx()), HEADERS, st.binary(max_size=60)))
@example(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2**60, 2**60))
@example(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 2**64 - 1))
def test_idx(folder: Path, content: bytes) -> None:
    read("idx", folder, content)


class Opened:
    def __reduce__(self) -> Any:
        return open, ("pickled", "w")


def of_objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Opened()], dtype=object), allow_pickle=True)
    return stream.getvalue()


@fuzzed(150)
@given(damaged(inputs.npy()))
@example(pickle.dumps(Opened()))
@example(inputs.npy().replace(b"rder': False, 'shape': (", b""))
@example(of_objects())
@example(inputs.npy().replace(b"NUMPY\1", b"NUMPY\3"))
@example(inputs.npy().replace(b"'<i4'", b"'|V0'").replace(b"(3, 2)", b"(9999,)")[:128])
@example(inputs.npy().replace(b"(3, 2)", b"(-3, -2)"[:8]).replace(b"'<i4'", b"'|O' "))
def test_npy(folder: Path, content: bytes) -> None:
    """What is no array of numbers is not whole, so that Megatron never unpickles it."""
    read("npy", folder, content)


def packed(compression: int) -> bytes:
    """As torch.save writes it, but packed: it unpacks to a thousand times its size."""
    stream, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(inputs.values()))
    with zipfile.ZipFile(stream, "w", compression) as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, bytes(2**24) if entry.filename.endswith("data/0") else content)
    return stream.getvalue()


@fuzzed(150)
@given(damaged(inputs.values()))
@example(packed(zipfile.ZIP_DEFLATED))
@example(pickle.dumps({"a": 1}))
def test_values(folder: Path, content: bytes) -> None:
    read("values", folder, content)


def test_an_archive_that_grows_is_refused(folder: Path) -> None:
    (folder / "packed.pt").write_bytes(packed(zipfile.ZIP_DEFLATED))
    with pytest.raises(UsageError, match="an archive that is packed"):
        load_values(folder / "packed.pt")


LONG_PUT = pickle.PROTO + b"\x02]" + pickle.LONG_BINPUT
CLASS_CHANGED = (
    b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
    b"N}X\x08\x00\x00\x00__init__ccollections\nOrderedDict\ns\x86b."
)
OPCODES = st.lists(
    st.one_of(
        st.sampled_from(
            [getattr(pickle, name) for name in pickle.__all__ if name.isupper() and name != "HIGHEST_PROTOCOL"]
        ).filter(lambda code: isinstance(code, bytes)),
        st.sampled_from([struct.pack("<Q", edge) for edge in EDGES if 0 <= edge < 2**64]),
        st.sampled_from([struct.pack("<I", edge) for edge in EDGES if 0 <= edge < 2**32]),
        st.sampled_from([b"ccollections\nOrderedDict\n", b"cpathlib\nPath\n", b"ctorch\nSize\n", b"cos\nsystem\n"]),
    ),
    max_size=12,
).map(lambda codes: b"\x80\x04" + b"".join(codes) + b".")


@fuzzed(250)
@given(st.one_of(damaged(inputs.FILES["metadata"][0]()), OPCODES))
@example(LONG_PUT + struct.pack("<I", 2**32 - 1) + b".")
@example(b"\x80\x02]p4294967295\n.")
@example(b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 2**60) + b".")
@example(b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 2**33) + b".")
@example(b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**40) + b".")
@example(b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**30) + b".")
@example(b"\x80\x04" + pickle.FRAME + struct.pack("<Q", 2**50) + b".")
@example(CLASS_CHANGED)
@example(b"\x80\x02" + b"(" * 100_000 + b".")
def test_metadata(folder: Path, content: bytes) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    before = Metadata.__init__
    read("metadata", folder, content)
    assert Metadata.__init__ is before, "a pickle has changed a class"
    assert OrderedDict.__name__ == "OrderedDict"


def safetensors(header: bytes, length: int | None = None, rest: bytes = bytes(32)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


SHAPES = st.lists(st.sampled_from(EDGES[:-2]), max_size=4)


@fuzzed(150)
@given(
    st.one_of(
        damaged(inputs.safetensors()),
        json_files({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).map(safetensors),
        SHAPES.map(
            lambda s: safetensors(b'{"a": {"dtype": "F32", "shape": %s, "data_offsets": [0, 0]}}' % str(s).encode())
        ),
    )
)
@example(safetensors(b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'))
@example(safetensors(b'{"a": {"dtype": "F32", "shape": [1152921504606846976, 0], "data_offsets": [0, 0]}}'))
@example(safetensors(b'{"a": {"dtype": "F32", "shape": [2, 2.5], "data_offsets": [0, 16]}}'))
@example(safetensors(b'{"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}'))
@example(safetensors(b"[" * 100_000))
@example(safetensors(b"{}", 2**60))
def test_safetensors(folder: Path, content: bytes) -> None:
    read("safetensors", folder, content)


@fuzzed(150)
@given(json_files(inputs.TOKENIZER))
@example(b"[" * 100_000)
@example(json.dumps({**inputs.TOKENIZER, "model": {**inputs.TOKENIZER["model"], "vocab": {}}}).encode())
def test_tokenizer(folder: Path, content: bytes) -> None:
    read("tokenizer", folder, content)


@fuzzed(100)
@given(json_files({"eos_token": {"content": "</s>"}}))
def test_tokenizer_config(tmp_path_factory: Any, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "tokenizer_config.json").write_bytes(content)
    read("tokenizer", folder, inputs.FILES["tokenizer"][0]())


@fuzzed(60)
@given(TEXT)
@example("null:" + "9" * 5000)
@example("a\0b.json")
def test_names_of_tokenizers(name: str) -> None:
    run("names of tokenizers", load_tokenizer, name, refusals=inputs.FILES["tokenizer"][2])


@fuzzed(100)
@given(st.one_of(damaged(b"12\n"), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"9" * 5000)
@example("²".encode())
@example(b"../../x")
def test_tracker(folder: Path, content: bytes) -> None:
    read("tracker", folder, content)


@fuzzed(150)
@given(json_files({"x": {"size": 3, "xxh3_128": "ab"}, "y": {"size": 1, "xxh3_128": "cd"}}))
@example(b'{"../../etc/passwd": {"size": 3, "xxh3_128": ""}}')
@example(b'{"x": {"size": 1e999, "xxh3_128": ""}}')
@example(b"[" * 100_000)
def test_checksums(folder: Path, content: bytes) -> None:
    read("checksums", folder, content)
    (folder / "checksums.json").unlink(missing_ok=True)


LINES = inputs.json_lines()
OTHERS = [
    json.dumps([{"text": "a", "id": 1}, {"text": "b"}], indent=1).encode(),
    b'text,id\r\na,1\r\n"b\n""c""",2\r\n',
    b"id\ttext\n1\ta\n",
    gzip.compress(LINES) + gzip.compress(LINES),
    bz2.compress(LINES),
    lzma.compress(LINES),
    zstandard.ZstdCompressor().compress(LINES),
]


@fuzzed(300)
@given(st.one_of(damaged(LINES), json_files({"text": "a", "id": 1}), *map(damaged, OTHERS)))
@example(b"[" * 100_000)
@example(b'[{"text": ' + b"[" * 100_000)
@example(b'{"text": ' + b"1" * 5000 + b"}")
@example(gzip.compress(bytes(2**24)))
@example(b'text,id\n"' + b"x" * 300_000)
def test_corpus(folder: Path, content: bytes) -> None:
    read("corpus", folder, content)
