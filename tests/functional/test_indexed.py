"""Writing Megatron's indexed format with worker processes: the same files, and nothing left of what fails."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.indexed import check_prefix, write_corpus
from megatron_hyperp.data.tokenizer import NullTokenizer
from megatron_hyperp.errors import UsageError
from tests.functional.launch import ROOT
from tests.unit.test_indexed import numbers
from tools import preprocess_data

TOKENIZER = NullTokenizer(1000)


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    documents = numbers(400, length=1000)  # several batches
    for workers in (1, 2, 3):
        write_corpus(documents, tmp_path / str(workers), TOKENIZER, workers=workers)
    for suffix in (".bin", ".idx"):
        assert len({(tmp_path / f"{workers}{suffix}").read_bytes() for workers in (1, 2, 3)}) == 1
    assert check_prefix(tmp_path / "1").num_documents == 400


def test_an_error_in_a_worker_leaves_nothing(tmp_path: Path) -> None:
    documents = itertools.chain(numbers(400, length=1000), [Document("1 nonsense", 10)])
    with pytest.raises(UsageError, match="'nonsense' is not a token id"):
        write_corpus(documents, tmp_path / "corpus", TOKENIZER, workers=2)
    assert not list(tmp_path.iterdir())


def test_killed_run_leaves_no_prefix_and_no_workers(tmp_path: Path) -> None:
    script = (
        "import itertools, os, sys, time\n"
        "from megatron_hyperp.data.corpus import Document\n"
        "from megatron_hyperp.data.indexed import write_corpus\n"
        "from megatron_hyperp.data.tokenizer import NullTokenizer\n"
        "documents = (Document('1 ' * 100_000, 200_000) for _ in itertools.count())\n"
        "write_corpus(documents, sys.argv[1], NullTokenizer(10), workers=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "corpus")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    temporary = tmp_path / "corpus.bin.tmp"
    wait_until(lambda: temporary.exists() and temporary.stat().st_size > 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.bin.tmp"]
    wait_until(lambda: not session_members(process.pid))
    # The next run is not disturbed by what is left.
    write_corpus(numbers(3), tmp_path / "corpus", TOKENIZER)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["corpus.bin", "corpus.idx", "corpus.settings.json"]


def wait_until(condition, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.05)


def session_members(session: int) -> list[int]:
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(its_session) == session and state != "Z":
            members.append(int(folder.name))
    return members


def test_the_corpus_of_a_folder_is_the_same_for_any_number_of_workers(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = "".join(json.dumps({"text": document.text}) + "\n" for document in numbers(3000, length=200))
    (folder / "b").write_bytes(gzip.compress(lines.encode()) + gzip.compress(b'{"text": null}\n'))
    (folder / "a.csv").write_text("id,text\nx,1 2\n")
    (folder / "README.md").write_text("# no token ids")
    words = ["--input", str(folder), "--tokenizer", "null:1000", "--skip-bad-lines", "1"]
    for workers in ("1", "2"):
        preprocess_data.main([*words, "--output-prefix", str(tmp_path / workers), "--workers", workers])
        printed = capsys.readouterr().out
        assert "skipped 1 (1 plain text next to records: README.md)\n" in printed
        assert re.search(r"\ncsv +1 +1 +0\.0\njsonl \(gzip\) +1 +3,000 +\d\.\d\n", printed)
        assert re.search(r"\nleft out 1 bad line: \S+/b:3001 has no text .*\n3,001 documents, ", printed)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()
    (folder / "b").write_bytes((folder / "b").read_bytes()[:-30])
    with pytest.raises(UsageError, match="b is truncated"):
        preprocess_data.main([*words, "--output-prefix", str(tmp_path / "3"), "--workers", "2"])
    assert not list(tmp_path.glob("3*"))
