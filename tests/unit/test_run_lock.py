"""A folder is one job's at a time, and free as soon as that job is dead, however it died and wherever it ran."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import run_lock
from megatron_hyperp.training.run_lock import FILE, Owner, RunLock


def write_lock(folder: Path, *, silent: float, **changes: Any) -> None:
    """Leave the lock of a job, silent for some seconds."""
    path = folder / FILE
    owner = dataclasses.replace(Owner.this(), **changes)
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    moment = time.time() - silent
    os.utime(path, (moment, moment))


FAR = {"host": "n7", "boot": "another", "job": "4711", "beat": 0.2}


def test_another_node_that_beats_keeps_it(tmp_path: Path) -> None:
    write_lock(tmp_path, silent=0.0, **FAR)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match=r"in use by process \d+ on n7 of Slurm job 4711, since"):
            RunLock(tmp_path, "--run-dir")
    finally:
        over.set()
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("silent", [1000.0, 0.0])
def test_another_node_that_is_silent_loses_it(
    silent: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.0)
    write_lock(tmp_path, silent=silent, **FAR)
    started = time.monotonic()
    lock = RunLock(tmp_path, "--run-dir")
    assert (time.monotonic() - started >= run_lock.MOST_MISSED * 0.2) == (silent == 0.0)
    assert "on n7 of Slurm job 4711" in capsys.readouterr().err
    lock.release()


def test_a_process_id_that_is_used_again(tmp_path: Path) -> None:
    write_lock(tmp_path, silent=0.0, pid=os.getppid(), started=1.0)
    RunLock(tmp_path, "--run-dir").release()


@pytest.mark.parametrize("lives", [True, False])
def test_without_locks_of_the_kernel_the_process_decides(
    lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_lock", lambda _: None)
    write_lock(tmp_path, silent=1000.0, started=Owner.this().started if lives else 1.0)
    if lives:
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
            RunLock(tmp_path, "--run-dir")
    else:
        RunLock(tmp_path, "--run-dir").release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_a_damaged_lock_that_nobody_holds(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    RunLock(tmp_path, "--run-dir").release()
