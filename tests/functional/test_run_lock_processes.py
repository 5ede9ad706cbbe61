"""A folder is one process's at a time, and free as soon as that is dead, however it died."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import run_lock
from megatron_hyperp.training.run_lock import FILE, Owner, RunLock
from tests.unit.test_run_lock import write_lock

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, said: Any) -> None:
    """Take the lock, say so, and keep it until killed."""
    try:
        RunLock(folder, "--run-dir")
    except UsageError as error:
        said.put(str(error))
        return
    said.put("held")
    time.sleep(60)


@contextmanager
def holder(folder: Path) -> Iterator[BaseProcess]:
    said = FORK.Queue()
    process = FORK.Process(target=hold, args=(folder, said))
    process.start()
    try:
        assert said.get(timeout=20) == "held"
        yield process
    finally:
        process.kill()
        process.join()


def test_one_at_a_time(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        before = (tmp_path / FILE).read_bytes()
        with pytest.raises(
            UsageError, match=rf"^--run-dir {tmp_path} is in use by process {process.pid} on \S+, since"
        ):
            RunLock(tmp_path, "--run-dir")
        assert (tmp_path / FILE).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        # Stopped is not dead.
        psutil.Process(process.pid).suspend()
        with pytest.raises(UsageError, match="in use"):
            RunLock(tmp_path, "--run-dir")


def test_a_killed_job_leaves_it_free_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as process:
        assert process.pid is not None
        # Not waited for: its parent may be slow to notice.
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        lock = RunLock(tmp_path, "--run-dir")
    assert f"was held by process {process.pid} on" in capsys.readouterr().err
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_its_children_do_not_keep_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "--run-dir")
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    lock.release()
    RunLock(tmp_path, "--run-dir").release()
    child.kill()
    child.join()


def test_of_many_that_find_it_left_over_one_gets_it(tmp_path: Path) -> None:
    write_lock(tmp_path, silent=0.0, started=1.0)
    said = FORK.Queue()
    many = [FORK.Process(target=hold, args=(tmp_path, said)) for _ in range(8)]
    for process in many:
        process.start()
    try:
        told = [said.get(timeout=30) for _ in many]
    finally:
        for process in many:
            process.kill()
            process.join()
    assert told.count("held") == 1
    assert sum("in use by process" in line for line in told) == 7


def test_who_finds_it_taken_over_on_waking_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    with holder(tmp_path) as process:
        other = tmp_path / "other"
        other.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this(), host="n8"))))
        os.replace(other, tmp_path / FILE)
        process.join(10)
        assert process.exitcode == 2
        assert "n8" in (tmp_path / FILE).read_text()
