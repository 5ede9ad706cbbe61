"""SECURITY.md's promises that no other test holds: permissions, names, pickled caches, calls that are not there."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hyperp import checksums
from megatron_hyperp.data.datasets import _held_cache
from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling import slurm
from tests.commands import run_here
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_array_is_words() -> None:
    """Never a line: each option, whatever is in it, is one word of sbatch."""

    class Sweep:
        series = (1, 2)
        slurm = {"partition": "a; touch x", "comment": "$(touch x)\n"}  # noqa: RUF012

    spec: Any = Sweep()
    command = slurm.array(spec, Path("a b.sbatch"), ["$(touch x)"], name="`touch x`", folder=Path("r s"), workers=2)
    assert "--job-name=`touch x`" in command
    assert "--comment=$(touch x)\n" in command
    assert command[-1] == "$(touch x)"


def test_no_shell_and_no_evaluation() -> None:
    """In no file of ours; pickle, torch.load, yaml.load and np.load where they are restricted, and there alone."""
    calls = {
        r"shell=True|os\.system|os\.popen|\beval\((?!\))|\bexec\(|trust_remote_code=True|weights_only=False": set[
            str
        ](),
        # What a rank's own writers report to it.
        r"\bpickle\.loads?\(|pickle\.Unpickler": {"megatron_hyperp/megatron_compat/async_saving.py"},
        r"\btorch\.load\(": {"megatron_hyperp/pickles.py", "megatron_hyperp/convert/storage.py"},
        r"\byaml\.(load|full_load|unsafe_load|safe_load)\(": {"megatron_hyperp/yaml_files.py"},
        r"\bnp\.load\(|allow_pickle=True": set[str](),
    }
    files = [
        path for top in ("megatron_hyperp", "tools", "examples", "benchmarks") for path in ROOT.glob(f"{top}/**/*.py")
    ]
    assert len(files) > 100
    for pattern, allowed in calls.items():
        found = set()
        for path in files:
            # Documentation says how users of transformers load a folder of ours, which has code of its own.
            text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
            if re.search(pattern, text):
                found.add(str(path.relative_to(ROOT)))
        assert found == allowed, pattern


class Touching:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return open, (str(self.proof), "w")


@pytest.mark.parametrize("kind", ["pickle", "array of objects"])
def test_pickles_among_cached_indices_are_dropped(tmp_path: Path, kind: str) -> None:
    """Megatron would load them with ``allow_pickle=True``."""
    proof, cache = tmp_path / "proof", tmp_path / "cache"
    cache.mkdir()
    stream = io.BytesIO()
    np.save(stream, np.array([Touching(proof)], dtype=object), allow_pickle=True)
    content = stream.getvalue() if kind == "array of objects" else pickle.dumps(Touching(proof))
    (cache / "x-shuffle_index.npy").write_bytes(content)
    np.save(cache / "whole.npy", np.arange(3))
    # Also where whoever put them there took their checksums.
    checksums.write(cache, {path.name: checksums.checksum(path) for path in cache.glob("*.npy")})
    with _held_cache(cache):
        assert sorted(path.name for path in cache.glob("*.npy")) == ["whole.npy"]
    assert not proof.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_checksums_name_files_of_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / checksums.FILE).write_text(json.dumps({name: {"size": 1, "xxh3_128": "0"}}))
    assert checksums.first_fault(folder) == f"{name} is missing"


def test_messages_write_to_no_terminal() -> None:
    error = UsageError("a name \x1b[2J\x07 of\r\nothers\u202e")
    assert str(error) == "a name \\x1b[2J\\x07 of\\r\\nothers\\u202e"
    assert len(str(UsageError("x" * 10**6))) < 5000


def test_what_a_command_writes_is_not_writable_to_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where the umask lets everyone: of others' bits, that of writing is taken away."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("1 2 3\n")
    words = ["--input", tmp_path / "texts", "--tokenizer", "null:8", "--workers", 1]
    words += ["--output-prefix", tmp_path / "new" / "toy"]
    before = os.umask(0)
    try:
        assert run_here(preprocess_data.main, *words, capsys=capsys).returncode == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {f"toy.{suffix}": 0o664 for suffix in ("bin", "checksums.json", "idx", "settings.json")}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o775
