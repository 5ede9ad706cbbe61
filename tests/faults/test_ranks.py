"""Ranks that stop, are signalled, or are not like the others; clocks that jump; helpers that die; two jobs at once."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import LAYOUTS, Undisturbed
from tests.faults.job import Job, assert_told
from tests.faults.ledger import Fault
from tests.faults.planting import AtLine, Clock, Raised
from tests.faults.seeds import seeds
from tests.functional.launch import assert_same_run

Runs = Callable[[str], Undisturbed]
Record = Callable[[Fault], None]


@pytest.mark.parametrize("seed", seeds(0, 12))
def test_a_stopped_rank(seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """The others end when a collective has waited long enough; a launcher then kills the one that does not move."""
    picked, run = random.Random(seed), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    place, rank = picked.choice(["save", "datasets", "optimizer", "loop"]), picked.randrange(2)
    job = Job(tmp_path / "job", run.config, run.flags)
    stops = AtLine(place, picked.uniform(0, 0.95), run.lines[rank][place], signal.SIGSTOP)
    ending = job.run({rank: stops}, stopped=[rank])
    assert ending.codes[rank] == -signal.SIGKILL, "the fault did not strike"
    assert_told(ending, rank)
    lost = job.lost_checkpoints()
    assert lost == 0
    record(Fault("SIGSTOP of a rank", "bit for bit", job.resumes(run.straight), lost))


@pytest.mark.parametrize("seed", seeds(0, 12))
def test_a_signalled_rank(seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """A request to stop comes to one rank, in whatever it does just then: nothing has to be done again."""
    picked, run = random.Random(f"signal {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    place, rank = picked.choice(["save", "optimizer", "loop"]), picked.randrange(2)
    job = Job(tmp_path / "job", run.config, run.flags)
    number = picked.choice([signal.SIGTERM, signal.SIGUSR1])
    # Not among the last lines: after the last step a signal acts as usual.
    ending = job.run({rank: AtLine(place, picked.uniform(0.3, 0.8), run.lines[rank][place], number)})
    assert not ending.hung
    assert ending.codes == [75, 75], ending.errors
    assert job.lost_checkpoints() == 0
    steps = job.resumes(run.straight)
    assert steps == 0
    record(Fault(f"{number.name} to a rank", "bit for bit", steps))


@pytest.mark.parametrize("seed", seeds(1, 2))
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        pytest.param(ValueError("a bug"), 1, "ValueError: a bug", id="error"),
        pytest.param(SystemExit(7), 7, "", id="exit", marks=pytest.mark.slow),
        pytest.param(KeyboardInterrupt(), 130, "interrupted: after iteration", id="interrupt", marks=pytest.mark.slow),
    ],
)
def test_an_exception_in_a_step(
    error: BaseException, code: int, message: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record
) -> None:
    """One that no code of this project raises: a bug, a library that exits, SIGINT to one rank."""
    picked, run = random.Random(f"{error!r} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(tmp_path / "job", run.config, run.flags)
    rank = picked.randrange(2)
    ending = job.run({rank: Raised(error, picked.randrange(2, 20))})
    assert_told(ending, rank)
    assert ending.codes[rank] == code
    assert ending.codes[1 - rank] == 76
    assert message in ending.errors[rank]
    assert ("Traceback" in ending.errors[rank]) == (code == 1)
    record(Fault(f"{type(error).__name__} in a step", "bit for bit", job.resumes(run.straight), job.lost_checkpoints()))


OTHERS = {
    "learning rate": ["--lr", 0.04],
    "seed": ["--seed", 5],
    "batch size": ["--global-batch-size", 64],
    "depth": ["--num-layers", 4],
    "width": ["--hidden-size", 128],
    "optimizer": ["--optimizer", "muon"],
    "layout": ["--tensor-model-parallel-size", 2],
    "save interval": ["--save-interval", 3],
    "length": ["--train-iters", 30],
    "checkpoint": ["--load", "run/checkpoints/iter_0000008"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "seed" else [pytest.mark.slow]) for name in OTHERS]
)
def test_a_rank_with_other_settings(name: str, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = Job(shutil.copytree(run.half, tmp_path / "job"), run.config, run.flags)
    rank = random.Random(name).randrange(2)
    ending = job.run(words={rank: [*job.words(), *map(str, OTHERS[name])]})
    assert_told(ending)
    assert 0 not in ending.codes
    assert job.lost_checkpoints() == 0
    assert job.resumes(run.straight) == 0
    record(Fault("a rank with other settings", "refused"))


@dataclass(frozen=True)
class OtherCode:
    """Another version of the code on this rank."""

    def __call__(self) -> None:
        """Let the sources have another hash."""
        from megatron_hyperp.training import agreement

        agreement.code_digest = lambda: "0" * 12


@pytest.mark.slow
def test_a_rank_with_other_code(undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = Job(shutil.copytree(run.half, tmp_path / "job"), run.config, run.flags)
    ending = job.run({1: OtherCode()})
    assert_told(ending)
    assert ending.codes == [2, 2]
    assert "start all nodes from one checkout" in ending.lines()[0]
    assert job.resumes(run.straight) == 0
    record(Fault("a rank with other code", "refused"))


@pytest.mark.slow
@pytest.mark.parametrize("days", [-365, -1, 1, 365])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_clock_that_jumps(rank: int, days: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = Job(tmp_path / "job", run.config, run.flags)
    ending = job.run({rank: Clock(86400.0 * days, tmp_path / "proof")})
    assert (tmp_path / "proof").exists(), "the fault did not strike"
    assert ending.codes == [0, 0], ending.errors
    assert_same_run(job.folder, run.straight)
    record(Fault("clock jumps", "bit for bit"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_data_loader_dies(rank: int, workers: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """One of several, or the only one; jobs without any get one."""
    run = undisturbed("dp2")
    job = Job(tmp_path / "job", run.config, (*run.flags, "--num-workers", workers or 1))
    started = job.start()
    assert job.wait_for_rows(started, 4)
    loaders = [
        child
        for child in psutil.Process(started.processes[rank].pid).children()
        if "spawn" not in " ".join(child.cmdline()) and "resource_tracker" not in " ".join(child.cmdline())
    ]
    random.Random(rank).choice(loaders).kill()
    ending = started.wait(since=time.monotonic())
    assert any(ending.codes), "the fault did not strike"
    assert_told(ending)
    assert "a data-loading process of this rank died" in ending.errors[rank]
    record(Fault("data loader killed", "bit for bit", job.resumes(run.straight), job.lost_checkpoints()))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2, async save"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_writers_report_to_dies(
    rank: int, layout: str, undisturbed: Runs, tmp_path: Path, record: Record
) -> None:
    run = undisturbed(layout)
    job = Job(tmp_path / "job", run.config, run.flags)
    started = job.start()
    # After the first save has begun it.
    assert job.wait_for_rows(started, 10)
    helpers = [
        child
        for child in psutil.Process(started.processes[rank].pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert helpers
    for helper in helpers:
        helper.kill()
    ending = started.wait(since=time.monotonic())
    # A writer that finds nobody to report to leaves a traceback of its own.
    assert not ending.hung
    assert any(ending.codes), "the fault did not strike"
    assert set(ending.codes) <= {2, 76}, ending.errors
    assert ending.lines()
    record(Fault("writers' helper killed", "bit for bit", job.resumes(run.straight), job.lost_checkpoints()))


def test_two_jobs_on_one_run_folder(undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """The second is refused, the first does not notice."""
    run = undisturbed("dp2")
    job = Job(tmp_path / "job", run.config, run.flags)
    started = job.start()
    assert job.wait_for_rows(started, 2)
    second = Job(tmp_path / "second", run.config, run.flags)
    words = [word.replace("run", str(job.folder)) if word.startswith("run") else word for word in job.words()]
    ending = second.run(words=dict.fromkeys(range(2), words))
    assert_told(ending)
    assert ending.codes == [2, 2]
    assert "is in use by process" in ending.lines()[0]
    assert started.wait().codes == [0, 0]
    assert_same_run(job.folder, run.straight)
    record(Fault("two jobs on one run folder", "refused"))
