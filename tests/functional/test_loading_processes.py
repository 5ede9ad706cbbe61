"""Data-loading processes: when one dies or fails, and how they end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_hyperp.data.batches import Batch, SampleDataset, batches, is_lost_process, lost_process
from megatron_hyperp.errors import LostRankError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import multiprocessing, time, torch
from megatron_hyperp.data.batches import batches
samples = [{"tokens": torch.arange(4)}] * 1000
loader = batches(samples, micro_batch_size=1, num_workers=2)
next(loader)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


class Samples(SampleDataset):
    """Samples of which one is an error."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Batch:
        if index == self.bad:
            raise RuntimeError("a bug")
        return {"tokens": torch.full((4,), index)}


def _broken() -> Iterator[Batch]:
    raise ConnectionResetError("Connection reset by peer")
    yield


@pytest.mark.parametrize(("seconds", "error"), [(0.3, LostRankError), (60.0, ConnectionResetError)])
def test_a_socket_that_closes_before_its_process_has_ended(
    seconds: float, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch in the queue is fetched over a socket from its process, which may be about to end."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,), daemon=True)
    process.start()
    monkeypatch.setattr("megatron_hyperp.data.batches._start", lambda _: (_broken(), {process}))
    with pytest.raises(error):
        next(batches(Samples(), micro_batch_size=1, num_workers=1))
    process.kill()


def test_processes_keep_the_order() -> None:
    options: dict[str, Any] = {"micro_batch_size": 4, "consumed_samples": 4, "num_batches": 10}
    plain, parallel = (list(batches(Samples(), num_workers=number, **options)) for number in (0, 2))
    assert len(plain) == 10
    for left, right in zip(plain, parallel, strict=True):
        assert torch.equal(left["tokens"], right["tokens"])


def test_an_error_in_a_process_keeps_its_message() -> None:
    with pytest.raises(RuntimeError, match="a bug") as found:
        list(batches(Samples(bad=3), micro_batch_size=1, num_workers=1))
    assert type(found.value) is RuntimeError


def test_what_pytorch_says_of_a_death() -> None:
    told = RuntimeError(
        "DataLoader worker (pid 42) is killed by signal: Bus error. It is possible that dataloader's ..."
    )
    assert is_lost_process(told)
    assert "died (killed by signal: Bus error), as when memory or shared memory (/dev/shm) is full" in str(
        lost_process(told)
    )
    assert not is_lost_process(RuntimeError("Caught RuntimeError in DataLoader worker process 0."))


@pytest.mark.parametrize(("last", "code"), [("time.sleep(100)", -signal.SIGKILL), ("raise ValueError('a bug')", 1)])
def test_no_process_outlives_or_delays_the_end_of_its_parent(last: str, code: int, tmp_path: Path) -> None:
    """Whether that is killed, or ends by an error whose traceback refers to the loader."""
    with (tmp_path / "out").open("w+") as output, (tmp_path / "err").open("w+") as errors:
        parent = subprocess.Popen(
            [sys.executable, "-c", SCRIPT + last],
            stdout=output,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 60
        while "\n" not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes = [int(word) for word in (tmp_path / "out").read_text().split()]
        if code < 0:
            parent.kill()
        try:
            found = parent.wait(timeout=15)
        finally:
            parent.kill()
        time.sleep(1.0)
        left = [number for number in processes if _is_alive(number)]
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert len(processes) == 2
    assert (found, left) == (code, [])
    assert ("ValueError: a bug" in (tmp_path / "err").read_text()) == (code == 1)


def _is_alive(number: int) -> bool:
    """Whether a process runs; in a container nobody may collect the exit code of one that does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
