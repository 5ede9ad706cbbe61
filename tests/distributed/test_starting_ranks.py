"""The suite's own ranks: one that dies or hangs fails the test that started it, soon, and no other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cases import Cases
from tests.run_distributed import run_distributed


def together(how: str) -> int:
    """Sum the ranks; before that, rank 1 does what ``how`` names."""
    import torch
    import torch.distributed as dist

    from megatron_hyperp import device

    device.init_process_group(5)
    rank = dist.get_rank()
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "hang":
        # As a rank of the trainer does.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if rank == 1 and how == "raise":
        raise ValueError("of rank 1")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return int(total)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "(SIGKILL|closed by peer)"),
        ("raise", "(?s)rank 1:.*ValueError: of rank 1"),
        ("hang", "did not end within 15 s"),
    ],
)
def test_a_rank_that_fails_fails_one_test(how: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_distributed(together, 2, how, seconds=15)
    assert time.monotonic() - began < 60
    assert run_distributed(together, 2, "well") == [3, 3]


def test_a_result_is_computed_once_and_a_failure_kept(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(name: str, folder: Path) -> str:
        calls.append(name)
        assert not list(folder.iterdir())
        assert name != "bad", "it is bad"
        return name.upper()

    for _ in range(2):
        # As two processes of pytest would.
        cases = Cases(tmp_path / "shared", compute)
        assert (cases["a"], cases["a"], cases["b"]) == ("A", "A", "B")
        with pytest.raises(AssertionError, match="it is bad"):
            cases["bad"]
    assert calls == ["a", "b", "bad"]
