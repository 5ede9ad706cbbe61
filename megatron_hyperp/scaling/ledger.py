"""What trainings of a sweep came to: judged from their run folders, kept there, and gathered in one table."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import write_atomically
from megatron_hyperp.scaling.point import CONTRACT, Point, key_of
from megatron_hyperp.training.logging import METRICS_FILE, read_metrics

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
# Nats above the loss of guessing, ln of the vocabulary, from which on a model has learned nothing but errors.
MARGIN = 0.5
# What the trainer says when it gives up on non-finite gradients.
GAVE_UP = "steps in a row had a non-finite gradient"
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """How a training ended.

    Attributes:
        status: finished; diverged: the loss is not finite, or no lower than before the first step, or clearly above
            that of guessing, or the trainer gave up on non-finite gradients; failed: no result for any other reason.
        loss: held-out loss after the last iteration in nats per token, of six decimals; infinite when diverged, NaN
            when failed.
    """

    status: str
    loss: float

    @property
    def text(self) -> str:
        """The loss as it stands in the table; empty when failed."""
        if self.status == FAILED:
            return ""
        return f"{self.loss:.6f}" if math.isfinite(self.loss) else "inf"

    @classmethod
    def parse(cls, status: str, text: str) -> Result:
        """Read what a table or a result file says. Raises: ValueError where it is neither."""
        if status not in (FINISHED, DIVERGED, FAILED):
            raise ValueError(f"{status!r} is no status")
        return cls(status, float(text) if text else math.nan)


def judge(folder: Path, exit_code: int, *, iterations: int, vocabulary: int) -> Result:
    """Read the metrics and the log of a training that has ended.

    Args:
        folder: the run's.
        exit_code: of its process.
        iterations: after which it was to end.
        vocabulary: of its model.
    """
    if exit_code and GAVE_UP in last_line(folder):
        return Result(DIVERGED, math.inf)
    if exit_code or not (folder / METRICS_FILE).exists():
        return Result(FAILED, math.nan)
    losses = {row["iteration"]: row["eval_loss"] for row in read_metrics(folder) if "eval_loss" in row}
    if iterations not in losses:
        return Result(FAILED, math.nan)
    # The metrics write null for what is not finite.
    first, last = (math.inf if loss is None else loss for loss in (losses.get(0), losses[iterations]))
    if last < min(first, math.log(vocabulary) + MARGIN):
        return Result(FINISHED, round(last, 6))
    return Result(DIVERGED, math.inf)


def last_line(folder: Path) -> str:
    """The last line of a run's log that is not empty."""
    with suppress(OSError):
        lines = (folder / LOG_FILE).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


class Ledger:
    """The results of a sweep, from the run folders and from the table of an earlier one.

    Args:
        folder: of the sweep; its runs have folders in it.
        table: the CSV file.

    Attributes:
        known: result by key.

    Raises:
        UsageError: the table is not one that this class writes.
    """

    def __init__(self, folder: Path, table: Path) -> None:
        self._folder = folder
        self._table = table
        self.known = {key_of(row["run"]): Result.parse(row["status"], row["loss"]) for row in self._read_table()}
        self._read_folders()

    def _read_folders(self) -> None:
        """Take in what the run folders tell, those of other processes too; they beat the table."""
        for path in sorted(self._folder.glob(f"*/{RESULT_FILE}")):
            content = json.loads(path.read_text())
            self.known[key_of(path.parent.name)] = Result.parse(content["status"], content["loss"])

    def record(self, point: Point, result: Result) -> None:
        """Keep a result in its run folder; from then on the run is not repeated."""
        self.known[point.key] = result
        content = {"status": result.status, "loss": result.text}
        write_atomically(self._folder / point.name / RESULT_FILE, json.dumps(content) + "\n")

    def forget_failures(self) -> None:
        """Have the runs that diverged or failed run again."""
        for path in self._folder.glob(f"*/{RESULT_FILE}"):
            if json.loads(path.read_text())["status"] != FINISHED:
                path.unlink()
        self.known = {key: result for key, result in self.known.items() if result.status == FINISHED}

    def write(self, points: Iterable[Point], columns: Sequence[str]) -> None:
        """Write the table: rows of points with a result, in order, then rows of the old table that are of others.

        The same results give the same bytes, in whatever order they came.

        Args:
            points: in the order of the sweep.
            columns: beside the contract's.
        """
        with self._held_table():
            self._read_folders()
            rows: list[Row] = []
            seen: set[tuple[str, str]] = set()
            for point in points:
                result = self.known.get(point.key)
                if result is None or (point.method, point.key) in seen:
                    continue
                seen.add((point.method, point.key))
                rows.append(point.row(columns) | {"loss": result.text, "status": result.status, "run": point.name})
            names = {row["run"] for row in rows}
            rows += [row for row in self._read_table() if row["run"] not in names]
            write_atomically(self._table, _to_csv(rows))

    @contextmanager
    def _held_table(self) -> Iterator[None]:
        """Keep other processes of the sweep from writing the table meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "table.lock").open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read_table(self) -> list[Row]:
        if not self._table.exists():
            return []
        try:
            with self._table.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream, strict=True)
                missing = {*CONTRACT, "status", "run"} - set(reader.fieldnames or ())
                if missing:
                    raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
                rows = list(reader)
            for row in rows:
                Result.parse(row["status"], row["loss"])
        except (OSError, ValueError, csv.Error) as error:
            raise UsageError(f"{self._table} is no table of a sweep ({error}); name another with --csv") from error
        return rows


def _to_csv(rows: Sequence[Mapping[str, str]]) -> str:
    last = ("status", "run")
    others = dict.fromkeys((*CONTRACT, *(name for row in rows for name in row)))
    stream = io.StringIO()
    header = [*(name for name in others if name not in last), *last]
    writer = csv.DictWriter(stream, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
