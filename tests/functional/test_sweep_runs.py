"""Sweeps that start trainings, none of them real: results that no interruption changes, and their submission."""

from __future__ import annotations

import csv
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling import slurm
from megatron_hyperp.scaling.ledger import RESULT_FILE
from megatron_hyperp.scaling.point import CONTRACT
from megatron_hyperp.scaling.spec import Spec
from tests.functional.launch import ROOT
from tests.unit.test_sweep import content, prefix, sweep_of

__all__ = ["content", "prefix"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def launched(folder: Path) -> list[str]:
    path = folder / "launched.txt"
    return path.read_text().split() if path.exists() else []


def test_table(content: dict[str, Any], tmp_path: Path) -> None:
    assert sweep_of(content, tmp_path).run(workers=1) == 11
    rows = rows_of(tmp_path)
    assert tuple(rows[0])[:6] == CONTRACT
    assert list(rows[0])[6:] == ["eta0", "status", "run"]
    # The law takes sqrt(2), one step of the grid, off the deeper model's learning rate.
    assert [(row["depth"], row["eta0"]) for row in rows] == [
        *(("2", eta0) for eta0 in ("0.0212132", "0.03", "0.0424264", "0.06", "0.0848528")),
        *(("4", eta0) for eta0 in ("0.0212132", "0.03", "0.0424264", "0.06", "0.0848528", "0.12")),
    ]
    assert {row["status"] for row in rows} == {"finished"}
    best = [min((row for row in rows if row["depth"] == depth), key=lambda row: float(row["loss"])) for depth in "24"]
    assert [row["lr"] for row in best] == ["0.06", "0.05999999028"]
    assert not sweep_of(content, tmp_path).run(workers=1)


def test_interruptions_and_workers_leave_no_trace(content: dict[str, Any], tmp_path: Path) -> None:
    sweep_of(content, tmp_path / "straight").run(workers=1)
    expected = (tmp_path / "straight" / "results.csv").read_bytes()
    folder = tmp_path / "parts"
    second = sweep_of(content, folder)
    second.run(workers=1, only=second.spec.series[1:])
    assert [row["depth"] for row in rows_of(folder)] == ["4"] * len(rows_of(folder))
    half = folder / rows_of(folder)[0]["run"]
    (half / RESULT_FILE).unlink()
    (half / "leftover").write_text("of a run that was killed")
    (folder / "results.csv").unlink()
    sweep_of(content, folder).run(workers=3)
    assert not (half / "leftover").exists()
    assert (folder / "results.csv").read_bytes() == expected


def test_known_rows_count_where_the_folders_have_gone(content: dict[str, Any], tmp_path: Path) -> None:
    sweep_of(content, tmp_path / "here").run(workers=2)
    table = tmp_path / "here" / "results.csv"
    expected = table.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    assert not sweep_of(content, elsewhere, table).run(workers=1)
    assert not launched(elsewhere)
    assert table.read_bytes() == expected
    # Rows of other points than the sweep's stay, below its own.
    content["axes"]["num_layers"] = [4, 1]
    assert sweep_of(content, elsewhere, table).run(workers=1)
    rows = rows_of(tmp_path / "here")
    assert list(dict.fromkeys(row["depth"] for row in rows)) == ["4", "1", "2"]


def test_diverged_and_failed_are_recorded_and_not_repeated(content: dict[str, Any], tmp_path: Path) -> None:
    content["axes"] = {"lr": [0.06, 0.7, 1.5, 3.0]}
    content["set"]["num_layers"] = 2
    lines: list[str] = []
    sweep = sweep_of(content, tmp_path)
    sweep._say = lines.append
    assert sweep.run(workers=1) == 4
    found = [(row["loss"], row["status"]) for row in rows_of(tmp_path)]
    assert found == [("3.060000", "finished"), ("inf", "diverged"), ("inf", "diverged"), ("", "failed")]
    assert lines[0].startswith("[1/4] hyperp hyperp-d2-w64-0.00256M-lr0.06-s1-")
    assert "failed: error: out of memory, say" in lines[3]
    before = (tmp_path / "results.csv").read_bytes()
    assert not sweep_of(content, tmp_path).run(workers=1)
    again = sweep_of(content, tmp_path)
    again.ledger.forget_failures()
    assert again.run(workers=1) == 3
    assert len(launched(tmp_path)) == 7
    assert (tmp_path / "results.csv").read_bytes() == before


def test_a_search_takes_divergence_for_the_right_of_the_minimum_and_waits_after_failures(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["axes"] = {"num_layers": [2], "lr": {"start": 0.6, "factor": 3}}
    sweep_of(content, tmp_path / "diverged").run(workers=2)
    found = [(row["lr"], row["status"]) for row in rows_of(tmp_path / "diverged")]
    assert found == [
        *((lr, "finished") for lr in ("0.0222222", "0.0666667", "0.2")),
        *((lr, "diverged") for lr in ("0.6", "1.8")),
    ]
    content["axes"]["lr"]["start"] = 3.0
    sweep_of(content, tmp_path / "failed").run(workers=2)
    assert [row["status"] for row in rows_of(tmp_path / "failed")] == ["diverged", "failed", "failed"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_children_die_with_the_sweep(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The second training sends the sweep a signal and would run for ten minutes; then the sweep goes on."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_sweep import sweep_of; import yaml;"
        f"sweep_of(yaml.safe_load(Path(r'{tmp_path}/sweep.yaml').read_text()), Path(r'{tmp_path}')).run(workers=1)"
    )
    environment = {**os.environ, "FAKE_STOPS_AT": "lr0.03-", "FAKE_SIGNAL": name}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert ended.returncode == (-signal.SIGKILL if name == "SIGKILL" else -signal.SIGINT)
    (half,) = tmp_path.glob("*lr0.03-*")
    assert not (half / RESULT_FILE).exists()
    with (half / "lock").open() as lock:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("a training outlived the sweep")
    sweep_of(content, tmp_path).run(workers=1)
    sweep_of(content, tmp_path / "straight").run(workers=1)
    assert (tmp_path / "results.csv").read_bytes() == (tmp_path / "straight" / "results.csv").read_bytes()
    assert launched(tmp_path).count(half.name) == 2


def test_submission(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\n[ "$2" = --array=0-1%4 ] && [ "$4" = examples/slurm/sweep.sbatch ] && echo Submitted batch job 7\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    spec, folder = Spec(content, source="sweep.yaml"), tmp_path / "runs"
    template = Path("examples/slurm/sweep.sbatch")
    command = slurm.array(spec, template, ["tools/sweep.py", "sweep.yaml"], name="grid", folder=folder, workers=4)
    assert slurm.submit(command, folder) == "Submitted batch job 7"
    assert folder.is_dir()
    with pytest.raises(UsageError, match="sbatch refuses"):
        slurm.submit(["sbatch", "--array=0-5"], folder)
