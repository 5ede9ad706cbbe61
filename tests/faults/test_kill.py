"""Ranks that die: at any line of the training, and under torchrun at any moment."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_hyperp.training.logging import METRICS_FILE, read_metrics
from tests.faults.conftest import LAYOUTS, Undisturbed
from tests.faults.job import Job, assert_told
from tests.faults.ledger import Fault
from tests.faults.planting import PLACES, AtLine
from tests.faults.seeds import first, seeds
from tests.functional.launch import assert_same_run, launched, train, workers, write_config
from tests.toy import toy_config, write_corpus

Runs = Callable[[str], Undisturbed]
Record = Callable[[Fault], None]


@pytest.mark.parametrize("seed", seeds(1, 8))
@pytest.mark.parametrize("place", first(*PLACES))
def test_a_rank_killed_at_a_line(place: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """From the beginning, or after a resumption; loading is counted in resumed runs alone."""
    picked = random.Random(f"{place} {seed}")
    layout = list(LAYOUTS)[seed % len(LAYOUTS)]
    run = undisturbed(layout)
    resumed = place == "load" or picked.random() < 0.5
    job = Job(tmp_path / "job", run.config, run.flags)
    if resumed:
        shutil.copytree(run.half, job.place)
    rank = picked.randrange(2)
    lines = (run.resumed_lines if resumed else run.lines)[rank][place]
    # How often a save beside the training is asked for varies by a few lines.
    ending = job.run({rank: AtLine(place, picked.uniform(0, 0.95), lines)})
    assert ending.codes[rank] == -signal.SIGKILL, "the fault did not strike"
    assert_told(ending, rank)
    lost = job.lost_checkpoints()
    assert lost == 0
    steps = job.resumes(run.straight)
    record(Fault(f"SIGKILL of a rank: {place}", "bit for bit", steps, lost))


@pytest.mark.parametrize("seed", seeds(0, 4))
def test_all_ranks_killed_at_a_line(seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """A node that loses power."""
    picked, run = random.Random(seed), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(tmp_path / "job", run.config, run.flags)
    share = picked.uniform(0, 0.95)
    ending = job.run({rank: AtLine("loop", share, run.lines[rank]["loop"]) for rank in range(2)})
    # The one that is struck first may take the other with it.
    assert -signal.SIGKILL in ending.codes, "the fault did not strike"
    assert_told(ending, 0, 1)
    lost = job.lost_checkpoints()
    assert lost == 0
    record(Fault("SIGKILL of all ranks", "bit for bit", job.resumes(run.straight), lost))


KILLS, TORCHRUN_ITERATIONS = 8, 300


@pytest.mark.parametrize("seed", seeds(0, 4))
def test_torchrun_starts_killed_ranks_again(seed: int, workers: int, tmp_path: Path, record: Record) -> None:
    """Real workers of the launch script, killed some seconds after each start: imports and loading are among them."""
    iterations = {"train_iters": TORCHRUN_ITERATIONS, "save_interval": 7}
    toy = toy_config(write_corpus(tmp_path), tmp_path, num_layers=1, keep=2, num_workers=workers, **iterations)
    config, straight, folder = write_config(toy, tmp_path / "toy.yaml"), tmp_path / "straight", tmp_path / "run"
    train(config, "--run-dir", straight, "--num-workers", 0, ranks=2)
    picked, killed = random.Random(seed), 0
    words = ["bash", "examples/torchrun/single_node.sh", str(config)]
    with launched(words, NPROC_PER_NODE=2, LAYOUT="none", RUN_DIR=folder, MAX_RESTARTS=KILLS) as launcher:
        previous: set[int] = set()
        for _ in range(KILLS):
            ranks = _new_workers(launcher, previous)
            if not ranks:
                break
            _sleep(launcher, picked.uniform(0, 25))
            if launcher.poll() is not None:
                break
            previous |= {rank.pid for rank in ranks}
            with suppress(psutil.NoSuchProcess):  # it has just finished
                picked.choice(ranks).kill()
                killed += 1
        _, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, errors
    assert_same_run(folder, straight)
    assert not _left_behind(folder)
    steps = _done_again(folder)
    record(
        Fault("SIGKILL of a torchrun worker", "bit for bit", steps, Job(tmp_path, config).lost_checkpoints(), killed)
    )


def _new_workers(launcher: subprocess.Popen[str], previous: set[int]) -> list[psutil.Process]:
    deadline = time.monotonic() + 200
    while launcher.poll() is None and time.monotonic() < deadline:
        ranks = workers(launcher)
        if len(ranks) == 2 and not {rank.pid for rank in ranks} & previous:
            return ranks
        time.sleep(0.05)
    return []


def _sleep(launcher: subprocess.Popen[str], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(seconds)


def _left_behind(folder: Path) -> list[psutil.Process]:
    """Processes of a run that is over: a rank's writers look like the rank."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder) in (each.info["cmdline"] or [])]


def _done_again(folder: Path) -> int:
    """Rows of metrics that were written more than once."""
    rows = (folder / METRICS_FILE).read_text().splitlines()
    return len(rows) - len(read_metrics(folder))
