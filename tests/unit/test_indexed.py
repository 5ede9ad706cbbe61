"""Writing Megatron's indexed format, the refusal of damaged files, and the command lines that make them."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.indexed import (
    CorpusSummary,
    PrefixInfo,
    check_prefix,
    check_vocabulary,
    prefix_files,
    write_corpus,
)
from megatron_hyperp.data.tokenizer import NullTokenizer, load_tokenizer, train_sentencepiece
from megatron_hyperp.errors import UsageError
from tests.commands import run_here
from tools import preprocess_data, train_tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = NullTokenizer(1000)
HEADER_BYTES = 34


def numbers(count: int, length: int = 20) -> list[Document]:
    """Documents of token ids, no two alike."""
    texts = (" ".join(str((7 * number + place) % 999) for place in range(length)) for number in range(count))
    return [Document(text, len(text)) for text in texts]


def read_documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def check_one_error_line(process: subprocess.CompletedProcess[str], message: str) -> None:
    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    assert [line for line in lines if "error:" in line] == lines[-1:]
    assert message in lines[-1]
    assert "Traceback" not in process.stderr


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_corpus(numbers(5), tmp_path / "corpus", TOKENIZER)
    return tmp_path / "corpus"


# Writing


def test_documents_come_back_with_their_end(tmp_path: Path) -> None:
    documents = [Document("1 2 3", 5), Document("", 0), Document("4", 1)]
    summary = write_corpus(documents, tmp_path / "with", TOKENIZER)
    assert read_documents(tmp_path / "with") == [[1, 2, 3, 999], [4, 999]]
    expected = CorpusSummary(2, 1, 6, 6, summary.seconds, prefix_files(tmp_path / "with"))
    assert summary == expected
    write_corpus(documents, tmp_path / "without", TOKENIZER, append_eod=False)
    assert read_documents(tmp_path / "without") == [[1, 2, 3], [4]]


def test_text_survives_the_whole_way(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:20]]
    tokenizer = load_tokenizer(train_sentencepiece(texts, tmp_path / "tokenizer", vocab_size=500))
    write_corpus([Document(text, len(text)) for text in texts], tmp_path / "corpus", tokenizer)
    assert [tokenizer.decode(ids) for ids in read_documents(tmp_path / "corpus")] == texts


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "uint16"), (70000, "int32")])
def test_token_ids_are_stored_by_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write_corpus([Document(f"0 {vocab_size - 2}", 9)], tmp_path / "corpus", NullTokenizer(vocab_size))
    info = check_prefix(tmp_path / "corpus")
    assert (info.dtype, info.num_documents, info.num_tokens) == (np.dtype(dtype), 1, 3)
    assert check_vocabulary(tmp_path / "corpus", vocab_size) == vocab_size - 1


def test_existing_files_are_kept_unless_told(prefix: Path) -> None:
    before = read_documents(prefix)
    with pytest.raises(UsageError, match=r"corpus\.bin exists; pass --overwrite"):
        write_corpus(numbers(2), prefix, TOKENIZER)
    assert read_documents(prefix) == before
    write_corpus(numbers(2), prefix, TOKENIZER, overwrite=True)
    assert read_documents(prefix) == before[:2]


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no document with text"):
        write_corpus([Document("", 3)], tmp_path / "corpus", TOKENIZER)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_corpus(numbers(1), tmp_path / "file" / "corpus", TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Checking


def test_whole_prefix_passes(prefix: Path) -> None:
    info = check_prefix(prefix)
    assert info == PrefixInfo(str(prefix), 5, 5, 105, np.dtype("uint16"), info.digest)
    assert info.sequence_lengths().tolist() == [21] * 5


def test_digest_follows_the_lengths(prefix: Path, tmp_path: Path) -> None:
    write_corpus(numbers(5), tmp_path / "same", TOKENIZER)
    write_corpus(numbers(4), tmp_path / "other", TOKENIZER)
    digests = [check_prefix(path).digest for path in (prefix, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_refused(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(UsageError, match=rf"corpus\{suffix} does not exist; tools/preprocess_data\.py makes"):
        check_prefix(prefix)


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "", "folder/"])
def test_what_is_no_prefix_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="prefix"):
        check_prefix(name)


def test_index_cut_anywhere_is_refused(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    for length in (0, 1, 8, 9, 20, 33, 34, 35, 60, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"corpus\.idx is truncated|corpus\.idx holds \d+ bytes"):
            check_prefix(prefix)


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"MMIDIDY", "bad magic"),
        (0, b"\x80\x02}q\x00" * 8, "bad magic"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\xff", "dtype code 255"),
        (18, struct.pack("<Q", 2**64 - 1), "its header tells of"),
        (26, struct.pack("<Q", 2**63), "its header tells of"),
        (HEADER_BYTES, struct.pack("<i", -1), "overlap or leave gaps"),
        (HEADER_BYTES, struct.pack("<i", 22), "overlap or leave gaps"),
        (HEADER_BYTES + 4 * 5, struct.pack("<q", 2**62), "overlap or leave gaps"),
        (HEADER_BYTES + 4 * 5 + 8 * 5, struct.pack("<q", 1), "do not rise"),
        (HEADER_BYTES + 4 * 5 + 8 * 7, struct.pack("<q", -3), "do not rise"),
        (17, b"\x04", "overlap or leave gaps"),
    ],
)
def test_damaged_index_is_refused(prefix: Path, offset: int, replacement: bytes, message: str) -> None:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(replacement)] = replacement
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"corpus\.idx .*{message}"):
        check_prefix(prefix)


@pytest.mark.parametrize("change", [-1, -2, -210, 2])
def test_data_that_does_not_fit_the_index_is_refused(prefix: Path, change: int) -> None:
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(UsageError, match=r"corpus\.bin holds \d+ bytes where .*corpus\.idx tells of 210"):
        check_prefix(prefix)


def test_prefix_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "empty.idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0))
    with pytest.raises(UsageError, match=r"empty\.bin holds no tokens"):
        check_prefix(tmp_path / "empty")


def test_token_outside_the_vocabulary_is_refused(prefix: Path) -> None:
    assert check_vocabulary(prefix, 1000) == 999
    with pytest.raises(UsageError, match=r"corpus\.bin holds token id 999, outside a vocabulary of 999"):
        check_vocabulary(prefix, 999)


def test_negative_token_is_refused(tmp_path: Path) -> None:
    write_corpus(numbers(2), tmp_path / "corpus", NullTokenizer(70000))
    path = tmp_path / "corpus.bin"
    path.write_bytes(struct.pack("<i", -1) + path.read_bytes()[4:])
    with pytest.raises(UsageError, match="token id -1, outside"):
        check_vocabulary(tmp_path / "corpus", 70000)


@pytest.mark.parametrize("place", [0, -1])
def test_large_data_is_sampled_at_both_ends(tmp_path: Path, place: int) -> None:
    tokens = np.zeros(5 * 2**20 + 3, dtype=np.uint16)
    tokens[place] = 50
    lengths = np.array([len(tokens)], dtype="<i4").tobytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2)
    (tmp_path / "large.idx").write_bytes(header + lengths + struct.pack("<qqq", 0, 0, 1))
    tokens.tofile(tmp_path / "large.bin")
    for full_scan_bytes in (0, 4 * 2**20, 2**30):
        assert check_vocabulary(tmp_path / "large", 51, full_scan_bytes=full_scan_bytes) == 50
        with pytest.raises(UsageError, match="token id 50"):
            check_vocabulary(tmp_path / "large", 50, full_scan_bytes=full_scan_bytes)


# Command lines


def test_command_lines_from_text_to_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps({"body": f"def f{n}(x): return x + {n}\n"}) + "\n" for n in range(200)))
    options = ("--input", source, "--json-key", "body")
    flags = (*options, "--vocab-size", 300, "--output", tmp_path / "tok")
    trained = run_here(train_tokenizer.main, *flags, capsys=capsys)
    assert trained.returncode == 0, trained.stderr
    assert "200 documents" in trained.stdout
    assert "300 tokens" in trained.stdout
    flags = (*options, "--limit", 50, "--tokenizer", tmp_path / "tok.model", "--workers", 1)
    written = run_here(preprocess_data.main, *flags, "--output-prefix", tmp_path / "out" / "corpus", capsys=capsys)
    assert (written.returncode, written.stderr) == (0, "")
    info = check_prefix(tmp_path / "out" / "corpus")
    assert info.num_documents == 50
    assert f"50 documents, {info.num_tokens} tokens" in written.stdout
    assert "tokens per byte" in written.stdout
    assert f"wrote {tmp_path}/out/corpus.bin and {tmp_path}/out/corpus.idx" in written.stdout


def test_command_lines_refuse_in_one_line(tmp_path: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "data.txt"
    text.write_text("1 2 3")
    (tmp_path / "bad.model").write_text("nonsense")
    good = {"--input": text, "--tokenizer": "null:10", "--output-prefix": tmp_path / "new", "--workers": 1}
    cases: list[tuple[dict[str, object], str]] = [
        ({"--input": tmp_path / "absent"}, "absent does not exist"),
        ({"--tokenizer": tmp_path / "bad.model"}, "bad.model is not a whole SentencePiece model"),
        ({"--tokenizer": "null:3"}, "'3' is not a token id below 3"),
        ({"--output-prefix": prefix}, "corpus.bin exists"),
        ({"--json-key": "body"}, "--json-key body has no effect"),
        ({"--suffixes": ".txt"}, "--suffixes has no effect"),
        ({"--max-bytes": "many"}, "'many' is not a size"),
        ({"--workers": "0"}, "'0' is not a whole number above 0"),
    ]
    for change, message in cases:
        arguments = itertools.chain.from_iterable((good | change).items())
        check_one_error_line(run_here(preprocess_data.main, *arguments, capsys=capsys), message)
    assert not (tmp_path / "new.bin").exists()
    flags = ("--input", text, "--vocab-size", 9000, "--output", tmp_path / "tok")
    trained = run_here(train_tokenizer.main, *flags, capsys=capsys)
    check_one_error_line(trained, "a vocabulary of 9000 cannot be trained")


def test_a_tokenizer_is_not_trained_on_part_of_its_texts(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(gzip.compress(b"".join(b'{"text": "%d and more"}\n' % number for number in range(9000)))[:-9])
    with pytest.raises(UsageError, match="text is truncated"):
        train_tokenizer.main(["--input", str(text), "--vocab-size", "300", "--output", str(tmp_path / "tok")])
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_damaged_prefix_through_a_command_line(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path(f"{prefix}.idx").read_bytes()
    for vocabulary, index, message in ((9, whole, "token id"), (1000, whole[:-5], "corpus.idx holds")):
        Path(f"{prefix}.idx").write_bytes(index)
        done = run_here(lambda argv: print(check_vocabulary(argv[0], int(argv[1]))), prefix, vocabulary, capsys=capsys)
        check_one_error_line(done, message)
