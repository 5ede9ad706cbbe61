"""What the fault suite shares: undisturbed runs of each layout, runs half way, the table at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job import Job
from tests.faults.ledger import KEY, Fault, entry, table
from tests.faults.planting import Lines
from tests.faults.seeds import worker_counts
from tests.functional.launch import assert_same_run, write_config
from tests.toy import EXPERTS, toy_config, write_corpus

ITERATIONS, HALF = 24, 12
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "dp2": (),
    "tp2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pp2, async save": ("--pipeline-model-parallel-size", 2, "--async-save"),
    "ep2, async save": ("--expert-model-parallel-size", 2, "--async-save"),
}


@dataclass
class Undisturbed:
    """A run that nothing happened to, and the same run half way, for jobs with so many data-loading processes per rank.

    Attributes:
        config: its config file.
        flags: of its layout, and ``--num-workers``.
        straight: its folder; made without data-loading processes, whose number must not change a bit.
        half: working folder of the run that has stopped at ``HALF``.
    """

    config: Path
    flags: tuple[Any, ...]
    straight: Path
    half: Path

    @cached_property
    def lines(self) -> list[dict[str, int]]:
        """Lines executed by each rank from the beginning to the end, by place."""
        return self._count("lines", None)

    @cached_property
    def resumed_lines(self) -> list[dict[str, int]]:
        """The same from the half to the end."""
        return self._count("resumed_lines", self.half)

    def _count(self, name: str, begun: Path | None) -> list[dict[str, int]]:
        folder = self.config.parent / f"{name}_{self.flags[-1]}"
        if begun is not None:
            shutil.copytree(begun, folder)
        job, files = Job(folder, self.config, self.flags), [self.config.parent / f"{folder.name}.{i}" for i in range(2)]
        ending = job.run({rank: Lines(file) for rank, file in enumerate(files)})
        assert ending.codes == [0, 0], ending.errors
        assert_same_run(job.folder, self.straight)
        return [_counts(file) for file in files]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Undisturbed]:
    """Return a function that runs a layout, once, for a number of data-loading processes per rank."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def layout(name: str) -> Undisturbed:
        return _run(folder / str(list(LAYOUTS).index(name)), name)

    @cache
    def of(name: str, workers: int) -> Undisturbed:
        run = layout(name)
        return replace(run, flags=(*run.flags, "--num-workers", workers))

    return of


@pytest.fixture
def undisturbed(runs: Callable[[str, int], Undisturbed], workers: int) -> Callable[[str], Undisturbed]:
    """Return a function that runs a layout, once; jobs with its flags have ``workers`` data-loading processes."""
    return lambda name: runs(name, workers)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try each fault with each number of data-loading processes per rank that ``FAULT_WORKERS`` names."""
    if "workers" in metafunc.fixturenames:
        metafunc.parametrize("workers", worker_counts(metafunc.definition.name), ids=lambda count: f"{count}workers")


def _run(folder: Path, layout: str) -> Undisturbed:
    folder.mkdir()
    shape = EXPERTS if layout.startswith("ep2") else {}
    toy = toy_config(
        write_corpus(folder, documents=500),
        folder,
        num_layers=2,
        train_iters=ITERATIONS,
        save_interval=8,
        keep=2,
        distributed_timeout_minutes=1 / 3,
        heartbeat_interval=2.0,
        **shape,
    )
    config, flags = write_config(toy, folder / "toy.yaml"), LAYOUTS[layout]
    straight, half = Job(folder / "straight", config, flags), Job(folder / "half", config, flags)
    for job, last in ((straight, ()), (half, ("--exit-interval", HALF))):
        ending = replace(job, flags=(*flags, *last)).run()
        assert ending.codes == [0, 0], ending.errors
    return Undisturbed(config, flags, straight.folder, half.place)


def _counts(file: Path) -> dict[str, int]:
    return {place: int(count) for place, count in map(str.split, file.read_text().splitlines())}


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Iterator[Callable[[Fault], None]]:
    """Put a fault into the table; a test that records none is no test of a fault."""
    recorded: list[Fault] = []

    def put(fault: Fault) -> None:
        recorded.append(fault)
        record_property(*entry(fault))

    yield put
    assert recorded


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [
        value for report in reports if report.when == "call" for name, value in report.user_properties if name == KEY
    ]
    failed = [str(report.longrepr) for report in terminalreporter.stats.get("failed", []) if "faults/" in report.nodeid]
    if rows or failed:
        hangs = sum(" hung: " in text for text in failed)
        terminalreporter.section("faults")
        terminalreporter.write_line(table(rows, hangs, len(failed) - hangs))
