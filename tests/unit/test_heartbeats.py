"""Signs of life: what is written, and which rank they find behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_hyperp.training import heartbeats
from megatron_hyperp.training.heartbeats import FOLDER, Heartbeats

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:17"


def of(run_dir: Path, rank: int, iteration: int, interval: float = 10.0) -> Heartbeats:
    return Heartbeats(run_dir, rank, interval, lambda: (iteration, "optimizer"))


def test_a_waiting_rank_beats(tmp_path: Path) -> None:
    path = tmp_path / FOLDER / "rank_3"
    with of(tmp_path, 3, 7, interval=0.05).beating():
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        first = path.stat().st_mtime
        while path.stat().st_mtime == first and time.monotonic() < deadline:
            time.sleep(0.01)
    assert path.stat().st_mtime > first
    assert json.loads(path.read_text()) == {"iteration": 7, "phase": "optimizer"}
    heartbeats.clear(tmp_path)
    assert not path.exists()


def test_none_are_written_at_an_interval_of_0(tmp_path: Path) -> None:
    with of(tmp_path, 0, 7, interval=0).beating():
        pass
    assert not (tmp_path / FOLDER).exists()


def test_the_silent_rank_is_named_before_a_slow_one(tmp_path: Path) -> None:
    for rank, iteration in ((0, 8), (1, 8), (2, 7)):
        of(tmp_path, rank, iteration).beat()
    assert of(tmp_path, 0, 8).behind() == "rank 2 has done 7 iterations (optimizer)"
    path = tmp_path / FOLDER / "rank_1"
    os.utime(path, (0, path.stat().st_mtime - 100))
    assert of(tmp_path, 0, 8).behind() == "rank 1 gave its last sign 100 s ago, after iteration 8 (optimizer)"
    of(tmp_path, 1, 8).beat()
    of(tmp_path, 2, 8).beat()
    assert of(tmp_path, 0, 8).behind() is None


@pytest.mark.parametrize("interval", [0.0, 10.0])
def test_a_failed_collective_is_one_line(tmp_path: Path, interval: float) -> None:
    line = of(tmp_path, 0, 7, interval).explain(RuntimeError(GLOO))
    assert line == (
        "a collective in iteration 8 failed: another rank died, or hung for --distributed-timeout-minutes"
        " (Connection closed by peer [127.0.0.1]:17); the launcher names a rank that died"
    )
    assert of(tmp_path, 0, 7, interval).explain(RuntimeError("shapes differ")) is None
    assert not (tmp_path / FOLDER).exists()
