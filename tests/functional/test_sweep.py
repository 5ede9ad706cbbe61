"""A sweep of real trainings is killed, goes on, and ends with the table of one that was left alone."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.functional.launch import ROOT, environment
from tests.toy import VOCABULARY


def sweep(spec: Path, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "tools/sweep.py", str(spec), "--output", str(folder)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(spec: Path, folder: Path) -> str:
    process = sweep(spec, folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def running_in(folder: Path) -> list[str]:
    """Command lines of trainings that run in a sweep's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if any("pretrain_gpt.py" in word for word in words) and any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.matrix
def test_a_killed_sweep_ends_with_the_same_table(corpus: str, tmp_path: Path) -> None:
    settings = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 64,
        "micro_batch_size": 8,
        "global_batch_size": 8,
        "train_iters": 40,
        "split": "90,10,0",
        "eval_iters": 2,
        "data_path": [corpus],
        "tokenizer_model": f"null:{VOCABULARY}",
    }
    spec = tmp_path / "sweep.yaml"
    spec.write_text(yaml.safe_dump({"set": settings, "axes": {"optimizer": ["hyperp", "adamw"], "lr": [0.03]}}))
    output = finish(spec, tmp_path / "straight")
    assert "[1/2] hyperp hyperp-d1-w32-0.02048M-lr0.03-s1234-" in output

    killed = tmp_path / "killed"
    process = sweep(spec, killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("adamw*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while running_in(killed):
        assert time.monotonic() < deadline, running_in(killed)
        time.sleep(0.05)
    assert not list(killed.glob("adamw*/result.json"))
    output = finish(spec, killed)
    assert "1 trainings done; 1 results were known before" in output

    table = (killed / "results.csv").read_bytes()
    assert table == (tmp_path / "straight" / "results.csv").read_bytes()
    rows = list(csv.DictReader(table.decode().splitlines()))
    assert [(row["method"], row["lr"], row["status"]) for row in rows] == [
        ("hyperp", "0.03", "finished"),
        ("adamw", "0.03", "finished"),
    ]
    assert float(rows[0]["loss"]) < 4.1
