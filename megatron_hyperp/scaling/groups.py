"""Runs from a CSV file, a sweep's or any other, and the groups of them in which only the learning rate differs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling.ledger import DIVERGED, FAILED
from megatron_hyperp.scaling.numerics import mean_losses

Value = str | float
# What every file must have; all but the method are numbers.
REQUIRED = ("method", "depth", "tokens", "flops", "lr", "loss")
# Columns that never set groups apart: what is searched over, repetitions, and what comes out.
NO_AXES = ("lr", "seed", "run", "status", "eta0", "loss", "flops")


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        values: its columns; numbers are floats.
        loss: its loss in nats per token; infinite if it diverged.
    """

    values: dict[str, Value]
    loss: float

    @property
    def method(self) -> str:
        """The optimizer's recipe, say."""
        return str(self.values["method"])

    def number(self, column: str) -> float:
        """A numeric column."""
        return float(self.values[column])


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ by their learning rate and seed alone.

    Attributes:
        key: the columns that set the group apart, with its values; method, depth and tokens first.
        runs: its runs, at least one.
    """

    key: dict[str, Value]
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """The optimizer's recipe, say."""
        return self.runs[0].method

    def number(self, column: str) -> float:
        """A numeric column, the same in all runs."""
        return self.runs[0].number(column)

    def name(self, without: Iterable[str] = ()) -> str:
        """The key in words, ``hyperp depth=2 tokens=1e+06``."""
        others = [
            f"{column}={shown(value)}" for column, value in self.key.items() if column not in ("method", *without)
        ]
        return " ".join([self.method, *others])

    def trainings(self) -> tuple[list[float], list[float], list[Value]]:
        """Learning rate, loss and seed of each run; without a column of seeds, as if all had one."""
        lrs, losses = [run.number("lr") for run in self.runs], [run.loss for run in self.runs]
        return lrs, losses, [run.values.get("seed", "") for run in self.runs]

    def mean_losses(self) -> dict[float, float]:
        """Mean loss over seeds by learning rate, ascending; infinite if one of them diverged."""
        return mean_losses(*self.trainings())


def shown(value: Value) -> str:
    """A value of a column in few characters, of which whole numbers lose none."""
    if isinstance(value, str):
        return value
    short = f"{value:.6g}"
    return f"{value:.0f}" if value.is_integer() and float(short) != value else short


def read_runs(path: str | Path) -> list[Run]:
    """Read the runs of a CSV file; those that failed or have no loss yet are left out.

    A run whose status is ``diverged`` or whose loss is not finite has an infinite loss.

    Raises:
        UsageError: no such file, a missing column, or something else than a number where one must be.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(
                    f"{path} has no column {', '.join(missing)}; its first line must name {', '.join(REQUIRED)}"
                )
            runs = [_run(row, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV ({error}); give the file that a sweep wrote") from error
    found = [run for run in runs if run]
    if not found:
        raise UsageError(f"{path} has no run with a loss; wait for the sweep's first one")
    return found


def _run(row: dict[str, str], where: str) -> Run | None:
    """A line of the file; None if its run failed or has no loss yet."""
    status, text = row.get("status") or "", row["loss"] or ""
    if status == FAILED or (not text and status != DIVERGED):
        return None
    # A line may lack its last cells, or have too many.
    values = {column: _value(cell or "") for column, cell in row.items() if column is not None}
    for column in ("depth", "tokens", "flops", "lr"):
        value = values[column]
        if isinstance(value, str) or not (math.isfinite(value) and value > 0):
            raise UsageError(f"{where}: {column} is {row[column]!r}; it must be a number above 0")
    loss = math.inf if status == DIVERGED else values["loss"]
    if isinstance(loss, str):
        raise UsageError(f"{where}: loss is {row['loss']!r}; it must be a number, or empty for a run without one")
    return Run(values, loss if math.isfinite(loss) else math.inf)


def _value(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


def matching(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """Return the runs that meet all conditions.

    Args:
        runs: of :func:`read_runs`.
        conditions: ``COLUMN=VALUE``; several for one column: any of these values.

    Raises:
        UsageError: not of this form, no such column, or no run is left.
    """
    wanted: dict[str, list[Value]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise UsageError(f"the condition {condition!r} is not of the form COLUMN=VALUE, say depth=2")
        check_columns(runs, [column])
        wanted.setdefault(column, []).append(_value(value))
    for column, values in wanted.items():
        there = sorted({shown(run.values[column]) for run in runs})
        runs = [run for run in runs if run.values[column] in values]
        if not runs:
            given = " ".join(f"{column}={shown(value)}" for value in values)
            raise UsageError(f"no run has {given}; there are {column}={', '.join(there)}")
    return list(runs)


def check_columns(runs: Sequence[Run], columns: Iterable[str]) -> None:
    """Raise a ``UsageError`` unless the file has all of some columns."""
    known = list(runs[0].values)
    for column in columns:
        if column not in known:
            raise UsageError(f"there is no column {column!r}; there are {', '.join(known)}")


def group_runs(runs: Sequence[Run], ignored: Iterable[str] = ()) -> list[Group]:
    """Cut runs into groups by method, depth, tokens and every further column that sets some of them apart.

    A column that follows from those before it (parameters from depth and width, say) is left out of the key.

    Args:
        runs: of :func:`read_runs`.
        ignored: columns that set no groups apart, besides :data:`NO_AXES`.

    Raises:
        UsageError: no such column, or runs of one group with different FLOPs, which cannot be of one model.
    """
    ignored = list(ignored)
    check_columns(runs, ignored)
    key = ["method", "depth", "tokens"]
    parts = _split(list(runs), key)
    for column in runs[0].values:
        if column not in (*key, *NO_AXES, *ignored):
            finer = _split(list(runs), [*key, column])
            if len(finer) > len(parts):
                key, parts = [*key, column], finer
    groups = [Group({name: part[0].values[name] for name in key}, tuple(part)) for part in parts]
    for group in groups:
        flops = {run.number("flops") for run in group.runs}
        if max(flops) > min(flops) * (1 + 1e-6):
            raise UsageError(
                f"the runs of {group.name()} have FLOPs from {min(flops):.4g} to {max(flops):.4g}, so they are not of"
                " one model; add a column that sets these models apart, hidden_size, say"
            )
    return sorted(groups, key=_order)


def _split(runs: list[Run], columns: Sequence[str]) -> list[list[Run]]:
    parts: dict[tuple[Value, ...], list[Run]] = {}
    for run in runs:
        parts.setdefault(tuple(run.values[column] for column in columns), []).append(run)
    return list(parts.values())


def _order(group: Group) -> list[tuple[bool, Value]]:
    """Sort numbers before words, and these by themselves."""
    return [(isinstance(value, str), value) for value in group.key.values()]


def series(groups: Iterable[Group], axis: str) -> dict[str, list[Group]]:
    """Cut groups into those that differ by one column alone, by the name of what they share."""
    by_name: dict[str, list[Group]] = {}
    for group in groups:
        by_name.setdefault(group.name(without=[axis]), []).append(group)
    return {name: sorted(members, key=lambda group: group.number(axis)) for name, members in by_name.items()}


def best_by_flops(groups: Iterable[Group]) -> dict[float, float]:
    """Return the lowest mean loss of any group and learning rate for each number of FLOPs, ascending."""
    best: dict[float, float] = {}
    for group in groups:
        lowest, flops = min(group.mean_losses().values()), group.number("flops")
        if math.isfinite(lowest):
            best[flops] = min(lowest, best.get(flops, math.inf))
    return dict(sorted(best.items()))
