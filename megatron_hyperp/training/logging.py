"""What a run tells: ``metrics.jsonl``, TensorBoard and Weights & Biases files, and lines for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_hyperp.config import Config

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
# Rows that a slow sink may leave waiting, and seconds that it gets at the end.
MOST_ROWS_WAITING = 10_000
SECONDS_TO_CLOSE = 30.0
# Variables with which wandb starts from a step of another run; an ID or WANDB_RESUME with them is refused.
_FORKS = {"WANDB_FORK_FROM", "WANDB_RESUME_FROM"}


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics in order; where a resumed run repeated an iteration, its last row counts.

    Later rows from before such a repetition are left out: with a larger batch the run may end before their iterations.
    A last line that a killed run left half written is passed over.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    last = 0
    for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["iteration"] < last:
            rows = {key: other for key, other in rows.items() if key[0] < row["iteration"]}
        last = row["iteration"]
        rows[last, kind_of(row)] = row
    return [rows[key] for key in sorted(rows)]


def kind_of(row: Mapping[str, Any]) -> str:
    """Say what a row of metrics is: "eval", "test", "stability" or "train"."""
    names = {"eval_loss": "eval", "test_loss": "test", "output_z": "stability"}
    return next((kind for name, kind in names.items() if name in row), "train")


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return what happened in a run, in order: alarms, checkpoints, resumptions; nothing if nothing is on record."""
    path, events = Path(run_dir) / EVENTS_FILE, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


class Sink(Protocol):
    """Something that rows of metrics go to, on rank 0."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row; ``iteration`` is its position on the time axis."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """``metrics.jsonl`` in the run folder: every row, at once.

    Args:
        run_dir: of the run.
        fresh: the run starts from scratch: metrics of an earlier run in the folder are kept under another name.
    """

    def __init__(self, run_dir: str | Path, *, fresh: bool) -> None:
        path, events = Path(run_dir) / METRICS_FILE, Path(run_dir) / EVENTS_FILE
        if fresh:
            for old in (path, events):
                if old.exists():
                    os.replace(old, _unused_name(old))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (closed in close)
        if self._file.tell() and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")  # a killed run left half a line

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; JSON has no NaN and no infinity, they become null."""
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard.

    Args:
        folder: of the event files.
        purge_step: of a resumed run, its first iteration: TensorBoard hides what the folder has from there on.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=purge_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of a row."""
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["iteration"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases, online or, with WANDB_MODE=offline, in the run folder.

    The environment's WANDB_RUN_ID, WANDB_RESUME, WANDB_NAME and WANDB_DIR come before what would be chosen here.

    Args:
        config: resolved.
        run_id: of the run to continue; None: a new one.
        parent: of a branch, for the run's config (lineage.py).
    """

    def __init__(self, config: Config, run_id: str | None, parent: Mapping[str, Any] | None) -> None:
        import wandb

        chosen: dict[str, Any] = {}
        if not _FORKS & os.environ.keys():
            if "WANDB_RUN_ID" not in os.environ:
                chosen["id"] = run_id
            if "WANDB_RESUME" not in os.environ:
                chosen["resume"] = "allow"
        if config.logging.wandb_exp_name or "WANDB_NAME" not in os.environ:
            chosen["name"] = config.logging.wandb_exp_name or Path(config.logging.run_dir).name
        if "WANDB_DIR" not in os.environ:
            chosen["dir"] = config.logging.run_dir
        self._run = wandb.init(
            project=config.logging.wandb_project,
            config=config.to_dict() | ({} if parent is None else {"parent": dict(parent)}),
            **chosen,
        )
        self.run_id: str = self._run.id

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row."""
        self._run.log(_scalars(row), step=int(row["iteration"]))

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class InBackground:
    """Lets a sink work in a thread of its own, so that a slow one never holds a step up, nor a broken one the run.

    Args:
        name: of the sink, for messages.
        sink: which may raise whatever it likes.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(MOST_ROWS_WAITING)
        self._thread = threading.Thread(target=self._work, args=(sink,), daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Hand a row over; dropped if the sink is that far behind."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(dict(row))

    def close(self) -> None:
        """Give the sink a while to finish."""
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=SECONDS_TO_CLOSE)
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            print(f"{self._name} does not finish; left behind", file=sys.stderr)

    def _work(self, sink: Sink) -> None:
        try:
            while (row := self._rows.get()) is not None:
                sink.write(row)
            sink.close()
        except Exception as error:  # a logging service must not take the training down with it
            print(f"{self._name} stopped ({error}); the run goes on without it", file=sys.stderr)
            while self._rows.get() is not None:
                pass


class MetricsWriter:
    """Writes rows of metrics wherever the config asks; made on every rank, active on rank 0.

    Args:
        config: resolved config.
        iteration: at which the run starts.
        active: whether this rank writes.
        fresh: as for :class:`JsonLines`.
        run_id: Weights & Biases run to continue.
        parent: as for :class:`WeightsAndBiases`.
    """

    def __init__(
        self,
        config: Config,
        iteration: int = 0,
        *,
        active: bool,
        fresh: bool,
        run_id: str | None = None,
        parent: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_id = run_id
        self._sinks: list[Sink] = []
        self._events = Path(config.logging.run_dir) / EVENTS_FILE if active else None
        if not active:
            return
        self._sinks.append(JsonLines(config.logging.run_dir, fresh=fresh))
        if config.logging.tensorboard_dir:
            tensorboard = TensorBoard(config.logging.tensorboard_dir, None if fresh else iteration + 1)
            self._sinks.append(InBackground("TensorBoard", tensorboard))
        if config.logging.wandb_project:
            try:
                service = WeightsAndBiases(config, run_id, parent)
                self.run_id = service.run_id
                self._sinks.append(InBackground("wandb", service))
            except Exception as error:
                print(f"wandb does not start ({error}); the run goes on without it", file=sys.stderr)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; ``iteration`` is its position on the time axis.

        Its values are numbers, or lists of them, which go to metrics.jsonl alone.
        """
        for sink in self._sinks:
            sink.write(row)

    def event(self, iteration: int, kind: str, message: str) -> None:
        """Append what happened to ``events.jsonl``."""
        if self._events is not None:
            row = {"iteration": iteration, "time": time.time(), "kind": kind, "message": message}
            with self._events.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Flush and close everything."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "iteration" and not isinstance(value, list)}


def _unused_name(path: Path) -> Path:
    number = 1
    while path.with_suffix(f".{number}{path.suffix}").exists():
        number += 1
    return path.with_suffix(f".{number}{path.suffix}")


class Console:
    """Lines for people on rank 0: a progress bar on a terminal, plain lines in a log.

    Args:
        active: whether this rank prints.
        quiet: warnings and the summary alone.
    """

    def __init__(self, *, active: bool, quiet: bool = False) -> None:
        self._active = active
        self._quiet = quiet
        self._total = self._total_tokens = 0
        self._progress: Any = None
        self._task: Any = None
        self._smoothed: float | None = None
        self._started = time.monotonic()
        self._first: int | None = None

    def set_end(self, iteration: int, tokens: int) -> None:
        """Set at which iteration, and after how many tokens, the run ends."""
        self._total, self._total_tokens = iteration, tokens

    def start_bar(self, done: int) -> None:
        """Show a progress bar if this is a terminal."""
        if self._active and not self._quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("", total=self._total, completed=done)
            self._progress.start()

    def stop_bar(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def print(self, text: str, *, important: bool = False) -> None:
        """Print a message, above the bar if there is one; an important one although the run is to be quiet."""
        if self._active and (important or not self._quiet):
            if self._progress is not None:
                self._progress.console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)

    def status(self, row: Mapping[str, float | int]) -> None:
        """Print one training row: percent, smoothed loss, lr, gradient norm, tokens/s, MFU, time left."""
        iteration, loss = int(row["iteration"]), float(row["loss"])
        self._smoothed = loss if self._smoothed is None else 0.7 * self._smoothed + 0.3 * loss
        if self._first is None:
            self._first, self._started = iteration, time.monotonic()
        pace = (time.monotonic() - self._started) / max(1, iteration - self._first)
        parts = [
            f"iteration {iteration}/{self._total} ({min(100, 100 * row['tokens'] / self._total_tokens):.0f}%)",
            f"loss {loss:.4f} (smoothed {self._smoothed:.4f})",
            f"lr {row['lr']:.3e}",
            f"grad {row['grad_norm']:.3f}",
            f"{row['tokens_per_s']:,.0f} tok/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {100 * row['mfu']:.1f}%")
        if iteration > self._first:
            parts.append(f"ETA {duration(pace * (self._total - iteration))}")
        if row["skipped"]:
            parts.append(f"skipped {row['skipped']}")
        line = " | ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration, description=" | ".join(parts[1:5]))
        else:
            self.print(line)


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
