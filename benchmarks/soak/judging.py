"""What a soak has shown: growth of memory, threads and files, and whether the disturbed run wrote the same losses."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.logging import kind_of, read_events, read_metrics

# Minutes in which a process still grows: imports, first checkpoint, first evaluation, the allocator's pools.
WARM_UP = 15.0
# Minutes of a life of the disturbed run at whose end lives are compared.
AGE = 1.5
MOST_GROWTH = 1.0
UNDISTURBED, RESTARTED = "undisturbed", "restarted"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a rank held at one moment.

    Attributes:
        minutes: since the soak began.
        run: "undisturbed" or "restarted".
        rank: of the run.
        pid: of its process.
        mib: resident memory, MiB.
        shared: the part of it that is pages of files and shared memory, MiB, which the system may take away.
        threads: of the process.
        files: open descriptors.
        children: processes of its own: loaders, the writers of checkpoints.
    """

    minutes: float
    run: str
    rank: int
    pid: int
    mib: float
    shared: float
    threads: int
    files: int
    children: int


def read_samples(path: Path) -> list[Sample]:
    """Read ``samples.csv``.

    Raises:
        UsageError: there is none.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}; leave --judge-only out to run the soak")
    with path.open(newline="") as stream:
        return [
            Sample(float(row["minutes"]), row["run"], int(row["rank"]), int(row["pid"]), float(row["mib"]),
                   float(row["shared"]), int(row["threads"]), int(row["files"]), int(row["children"]))
            for row in csv.DictReader(stream)
        ]  # fmt: skip


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Slope of the least-squares line; nan for less than three points."""
    x, y = np.array(list(points)).reshape(-1, 2).T
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 2 else float("nan")


def of(samples: Sequence[Sample], run: str, rank: int) -> list[Sample]:
    """Return the samples of one rank."""
    return [sample for sample in samples if (sample.run, sample.rank) == (run, rank)]


def held_at_age(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return for each process of a rank that grew so old (its start, what it held at ``AGE``), minutes and MiB."""
    lives = [list(life) for _, life in groupby(samples, key=lambda sample: sample.pid)]
    found = []
    for life in lives:
        old = next((sample for sample in life if sample.minutes - life[0].minutes >= AGE), None)
        if old is not None:
            found.append((life[0].minutes, old.mib))
    return found


def judge(folder: Path) -> int:
    """Print what a soak has shown, and draw ``memory.png``; return 0 if all is as promised, else 1."""
    samples = read_samples(folder / "samples.csv")
    ranks = sorted({sample.rank for sample in samples})
    sound = [_growth(samples, rank) for rank in ranks]
    sound += [_same_losses(folder), _leftovers(folder)]
    draw(samples, folder / "memory.png")
    print(f"{'as promised' if all(sound) else 'NOT AS PROMISED'}; {folder / 'memory.png'} shows the memory")
    return 0 if all(sound) else 1


def _growth(samples: Sequence[Sample], rank: int) -> bool:
    """Judge one rank of both runs."""
    whole = of(samples, UNDISTURBED, rank)
    warm = [sample for sample in whole if sample.minutes - whole[0].minutes >= WARM_UP]
    if len(warm) < 3:
        raise UsageError(f"the soak lasted less than the warm-up of {WARM_UP:g} minutes; give more --minutes")
    grows = slope((sample.minutes, sample.mib) for sample in warm)
    own = slope((sample.minutes, sample.mib - sample.shared) for sample in warm)
    print(
        f"rank {rank}, undisturbed: {warm[0].mib:.0f} to {warm[-1].mib:.0f} MiB after {WARM_UP:g} min of warm-up,"
        f" {grows:+.3f} MiB/min, {own:+.3f} without pages of files;"
        f" {_range(warm, 'threads')} threads, {_range(warm, 'files')} files"
    )
    again = of(samples, RESTARTED, rank)
    lives = held_at_age(again)
    between = slope(lives)
    print(
        f"rank {rank}, restarted:   {len({sample.pid for sample in again})} processes; {AGE:g} min old they held"
        f" {min(mib for _, mib in lives):.0f} to {max(mib for _, mib in lives):.0f} MiB, {between:+.3f} MiB/min"
    )
    third = len(warm) // 3
    # What is open at one moment varies with the saves under way; what leaks is there at every moment.
    leaks = [
        name
        for name in ("threads", "files")
        if min(getattr(each, name) for each in warm[-third:]) > max(getattr(each, name) for each in warm[:third])
    ]
    if leaks:
        print(f"rank {rank}: {' and '.join(leaks)} grow")
    return max(grows, own) < MOST_GROWTH and not between > MOST_GROWTH and not leaks


def _range(samples: Sequence[Sample], name: str) -> str:
    values = [getattr(sample, name) for sample in samples]
    return f"{min(values)} to {max(values)}"


def _same_losses(folder: Path) -> bool:
    """Compare all rows of both runs up to where the shorter one ended."""
    ours, theirs = ({_key(row): row for row in read_metrics(folder / name)} for name in (RESTARTED, UNDISTURBED))
    last = min(max(iteration for iteration, _ in rows) for rows in (ours, theirs))
    expected = {key: _figures(row) for key, row in theirs.items() if key[0] <= last}
    found = {key: _figures(row) for key, row in ours.items() if key[0] <= last}
    differing = [key for key in expected if found.get(key) != expected[key]]
    kinds = Counter(event["kind"] for event in read_events(folder / RESTARTED))
    print(
        f"iterations: {max(key[0] for key in theirs)} undisturbed, {max(key[0] for key in ours)} with"
        f" {kinds['resumed']} resumptions; of {len(expected)} rows up to {last}, {len(differing)} differ"
    )
    return not differing and found.keys() == expected.keys()


def _key(row: dict[str, Any]) -> tuple[int, str]:
    return row["iteration"], kind_of(row)


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    return {name: value for name, value in row.items() if name != "tokens_per_s"}


def _leftovers(folder: Path) -> bool:
    """Count processes of the soak that still run, and temporary files of the undisturbed run."""
    mark, left = str(folder.resolve()), 0
    for process in psutil.process_iter(["cmdline", "environ", "pid"]):
        settings = process.info["environ"] or {}
        left += settings.get("RUN_DIR", "").startswith(mark) and process.info["pid"] != psutil.Process().pid
    files = {name: sum(1 for _ in (folder / f"tmp-{name}").rglob("*")) for name in (UNDISTURBED, RESTARTED)}
    print(f"left behind: {left} processes; temporary files {files[UNDISTURBED]} and, restarted, {files[RESTARTED]}")
    return left == 0


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draw the memory of every rank of both runs over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for axis, run in zip(axes, (UNDISTURBED, RESTARTED), strict=True):
        for rank in sorted({sample.rank for sample in samples}):
            lives = groupby(of(samples, run, rank), key=lambda sample: sample.pid)
            for index, (_, life) in enumerate(lives):
                points = list(life)
                axis.plot(
                    [sample.minutes for sample in points],
                    [sample.mib for sample in points],
                    color=f"C{rank}",
                    label=None if index else f"rank {rank}",
                )
        axis.set(title=run, ylabel="resident MiB", ylim=(0, None))
        axis.legend(loc="lower right")
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
