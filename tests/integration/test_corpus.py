"""Finding and reading documents, and the sizes that choose them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_hyperp.data.arguments import parse_bytes
from megatron_hyperp.data.corpus import Corpus, python_corpus_paths
from megatron_hyperp.data.sources import Source, Sources, find_sources
from megatron_hyperp.errors import UsageError


def test_text_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub" / "__pycache__").mkdir(parents=True)
    texts = {"b.txt": "second\r\n", "a.py": "first", "sub/c.md": "third \ufeff", "sub/d.bin": "4"}
    for name, text in {**texts, "sub/__pycache__/e.txt": "no"}.items():
        (tmp_path / name).write_bytes(text.encode())
    corpus = Corpus(find_sources([tmp_path]))
    assert [document.text for document in corpus] == ["first", "second\r\n", "third \ufeff", "4"]
    assert corpus.total_bytes == sum(document.source_bytes for document in corpus)
    named = Corpus(find_sources([tmp_path / "sub" / "d.bin", tmp_path / "b.txt"]))
    assert [document.text for document in named] == ["4", "second\r\n"]
    assert [source.path.name for source in find_sources([tmp_path], suffixes=[".bin"]).read] == ["d.bin"]


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\n", "body": "1"}\n\n{"body": "2", "text": "two"}')
    assert [document.text for document in Corpus(find_sources([path]))] == ["one\n", "two"]
    assert [document.text for document in Corpus(find_sources([path]), json_key="body")] == ["1", "2"]


def test_limits_stop_before_the_document_that_exceeds_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * 5)
    assert len(list(Corpus(find_sources([path]), limit=3))) == 3
    assert len(list(Corpus(find_sources([path]), max_bytes=14 * 2 + 13))) == 2
    assert len(list(Corpus(find_sources([path]), max_bytes=10**6, limit=10**6))) == 5


def test_missing_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent does not exist"):
        find_sources([tmp_path / "absent"])
    with pytest.raises(UsageError, match=r"gone\.txt cannot be read: No such file"):
        list(Corpus(Sources([Source(tmp_path / "gone.txt", "text")])))


def test_python_corpus_is_text_without_repetition_and_mixed() -> None:
    paths = python_corpus_paths(max_bytes=3_000_000)
    assert paths == python_corpus_paths(max_bytes=3_000_000)
    contents = [path.read_bytes() for path in paths]
    assert all(0 < len(content) <= 1_000_000 for content in contents)
    assert 2_900_000 < sum(map(len, contents)) <= 3_000_000
    assert len(set(contents)) == len(contents)
    assert all(content.decode() and b"\0" not in content for content in contents)
    # Installed packages and the standard library are in both halves.
    for half in (paths[: len(paths) // 2], paths[len(paths) // 2 :]):
        assert {"site-packages" in path.parts for path in half} == {True, False}


@pytest.mark.parametrize(("text", "size"), [("4096", 4096), ("20MB", 20_000_000), ("1.5g", 1_500_000_000), ("2 k", 0)])
def test_sizes(text: str, size: int) -> None:
    if size:
        assert parse_bytes(text) == size
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            parse_bytes(text)
