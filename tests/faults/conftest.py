"""What the fault suite shares: undisturbed runs of each layout, runs half way, the table at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job import Job
from tests.faults.ledger import KEY, Fault, entry, table
from tests.faults.planting import Lines
from tests.functional.launch import write_config
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
    """A run that nothing happened to, and the same run half way.

    Attributes:
        config: its config file.
        flags: of its layout.
        straight: its folder.
        half: working folder of the run that has stopped at ``HALF``.
        lines: executed by each rank from the beginning to the end, by place.
        resumed_lines: the same from the half to the end.
    """

    config: Path
    flags: tuple[Any, ...]
    straight: Path
    half: Path
    lines: list[dict[str, int]]
    resumed_lines: list[dict[str, int]]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """Return a function that runs a layout, once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done: dict[str, Undisturbed] = {}

    def of(layout: str) -> Undisturbed:
        if layout not in done:
            done[layout] = _run(folder / str(len(done)), layout)
        return done[layout]

    return of


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
    ending = straight.run({rank: Lines(folder / f"lines{rank}") for rank in range(2)})
    assert ending.codes == [0, 0], ending.errors
    ending = Job(half.place, config, (*flags, "--exit-interval", HALF)).run()
    assert ending.codes == [0, 0], ending.errors
    rest = Job(shutil.copytree(half.place, folder / "rest"), config, flags)
    ending = rest.run({rank: Lines(folder / f"resumed_lines{rank}") for rank in range(2)})
    assert ending.codes == [0, 0], ending.errors
    counts = [[_counts(folder / f"{name}{rank}") for rank in range(2)] for name in ("lines", "resumed_lines")]
    return Undisturbed(config, flags, straight.folder, half.place, *counts)


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
