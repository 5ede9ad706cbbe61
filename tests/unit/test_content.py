"""Checksums of corpora: taken when they are written, compared when a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_hyperp.data.content import check_content, record
from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.indexed import write_corpus as write_documents
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from tests.toy import write_corpus
from tools import check_data


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    found = write_corpus(tmp_path, documents=20)
    record(found)
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_named(prefix: str) -> None:
    assert check_content(prefix)
    flip(Path(f"{prefix}.bin"))
    with pytest.raises(UsageError, match=r"toy\.bin is not what was written, as toy\.checksums\.json has it"):
        check_content(prefix)


def test_of_large_files_the_size_is_compared(prefix: str) -> None:
    flip(Path(f"{prefix}.bin"))
    assert check_content(prefix, most_bytes=10)
    with Path(f"{prefix}.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UsageError, match="bytes of"):
        check_content(prefix, most_bytes=10)


def test_damaged_checksums_are_refused(prefix: str) -> None:
    Path(f"{prefix}.checksums.json").write_text("{")
    with pytest.raises(UsageError, match=r"checksums\.json is damaged.*; python tools/check_data.py --record"):
        check_content(prefix)


def test_the_tool_tells_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_corpus(tmp_path, documents=20)
    check_data.main([prefix])
    assert "20 documents" in (told := capsys.readouterr().out)
    assert "nobody took its checksums" in told
    check_data.main([prefix, "--record"])
    assert capsys.readouterr().out.endswith(" tokens, as written\n")
    flip(Path(f"{prefix}.bin"))
    with pytest.raises(UsageError, match="not what was written"):
        check_data.main([prefix])


def test_a_corpus_made_anew_forgets_old_checksums(prefix: str, tmp_path: Path) -> None:
    document = Document(text="1 2 3", source_bytes=5)
    write_documents([document], prefix, load_tokenizer("null:64"), overwrite=True)
    assert not check_content(prefix)
    other = tmp_path / "elsewhere"
    other.mkdir()
    record(prefix)
    for suffix in (".bin", ".idx", ".checksums.json"):
        shutil.copy(f"{prefix}{suffix}", other)
    assert check_content(str(other / "toy"))
    # Under another name nothing is known of the files.
    for suffix in (".bin", ".idx", ".checksums.json"):
        (other / f"toy{suffix}").rename(other / f"new{suffix}")
    assert not check_content(str(other / "new"))
