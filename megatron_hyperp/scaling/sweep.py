"""Run the trainings of a sweep, each in a process and a folder of its own, and keep one table of their results.

Whatever is interrupted goes on: a run counts once its folder holds a result, and one without is started afresh. The
table depends on the results alone, not on the order in which they came or on how often the sweep was killed.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from megatron_hyperp import arguments
from megatron_hyperp.errors import UsageError
from megatron_hyperp.processes import die_with_parent
from megatron_hyperp.scaling.ledger import FAILED, LOG_FILE, Ledger, Result, judge, last_line
from megatron_hyperp.scaling.point import Point
from megatron_hyperp.scaling.spec import Series, Spec, apply

CONFIG_FILE = "sweep_config.yaml"
LOCK_FILE = "lock"
SECONDS_TO_END = 20.0
SECONDS_BETWEEN_LOOKS = 0.1
Command = Callable[[Path, int], list[str]]


def trainer_command(entry: Path) -> Command:
    """Return how to train a config on some ranks with ``examples/pretrain_gpt.py``."""

    def command(config: Path, ranks: int) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return [sys.executable, *launcher, str(entry), "--config", str(config)]

    return command


@dataclass(slots=True)
class Training:
    """A training that is running.

    Attributes:
        point: which.
        process: its process.
        lock: held as long as this process or that one lives.
        slot: number of the worker.
        started: monotonic time in seconds.
    """

    point: Point
    process: subprocess.Popen[bytes]
    lock: TextIO
    slot: int
    started: float


class Sweep:
    """The trainings of a sweep, some at a time.

    Args:
        spec: what to train.
        folder: of the runs.
        table: CSV file of the results.
        command: makes the command line of a training from its config file and its ranks.
        say: prints a line.

    Raises:
        UsageError: the table is not one of a sweep.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        folder: Path,
        table: Path,
        command: Command,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.ledger = Ledger(folder, table)
        self._command = command
        self._say = say
        self._running: list[Training] = []
        self._seconds: list[float] = []

    def wanted(self, series: Series) -> list[Point]:
        """The points of a series that its results so far ask for, in the order in which to train them.

        A search waits for a point that failed: what that would have shown is not known.
        """
        powers: list[int] = []
        while True:
            known = {power: self.ledger.known.get(series.point(power).key) for power in powers}
            losses = {power: result.loss for power, result in known.items() if result and result.status != FAILED}
            wider = series.powers(losses)
            if wider == powers:
                return [series.point(power) for power in powers]
            powers = wider

    def write(self) -> None:
        """Write the table of what is known by now."""
        points = (
            point
            for series in self.spec.series
            for point in sorted(self.wanted(series), key=lambda point: point.resolved.learning_rate().value)
        )
        self.ledger.write(points, self.spec.columns)

    def run(self, *, workers: int, only: Sequence[Series] | None = None) -> int:
        """Train what is not known yet; return how many trainings that were.

        Args:
            workers: trainings at a time, each with one thread a rank.
            only: series to train; all by default.

        Raises:
            UsageError: a training is being run by another process.
            KeyboardInterrupt: on SIGINT and SIGTERM, once the trainings are ended and the results written.
        """
        chosen = self.spec.series if only is None else only
        before = len(self.ledger.known)
        try:
            with _term_is_interrupt():
                while self._fill(chosen, workers) or self._running:
                    if not self._collect(chosen, workers):
                        time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._end_all()
            self.write()
        self._say(f"{len(self._seconds)} trainings done; {before} results were known before")
        return len(self._seconds)

    def _missing(self, chosen: Sequence[Series]) -> list[Point]:
        """Points without a result, running ones included; of those that are the same training the first."""
        points: dict[str, Point] = {}
        for series in chosen:
            for point in self.wanted(series):
                points.setdefault(point.key, point)
        return [point for key, point in points.items() if key not in self.ledger.known]

    def _fill(self, chosen: Sequence[Series], workers: int) -> bool:
        """Start what there is room for; return whether anything was."""
        running = {training.point.key for training in self._running}
        free = sorted(set(range(workers)) - {training.slot for training in self._running})
        waiting = [point for point in self._missing(chosen) if point.key not in running] if free else []
        for slot, point in zip(free, waiting, strict=False):
            self._running.append(self._start(point, slot))
        return bool(free and waiting)

    def _start(self, point: Point, slot: int) -> Training:
        folder = self.folder / point.name
        lock = _clean_folder(folder)
        config = arguments.to_yaml(apply(point.config, {"run_dir": str(folder)}, point.name))
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        # A launcher needs time to end its ranks.
        last_signal = signal.SIGTERM if self.spec.ranks > 1 else signal.SIGKILL
        with (folder / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                self._command(folder / CONFIG_FILE, self.spec.ranks),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(slot, self.spec.ranks),
                pass_fds=[lock.fileno()],
                start_new_session=True,
                # Outside Linux the lock of the run's folder tells the next sweep that a child has outlived this one.
                preexec_fn=partial(die_with_parent, os.getpid(), last_signal),
            )
        return Training(point, process, lock, slot, time.monotonic())

    def _collect(self, chosen: Sequence[Series], workers: int) -> bool:
        """Judge the trainings that have ended; return whether any had."""
        ended = [training for training in self._running if training.process.poll() is not None]
        for training in ended:
            self._running.remove(training)
            point, config = training.point, training.point.resolved
            result = judge(
                self.folder / point.name,
                training.process.returncode,
                iterations=config.training.train_iters,
                vocabulary=config.model.vocab_size,
            )
            self.ledger.record(point, result)
            training.lock.close()
            self.write()
            self._seconds.append(time.monotonic() - training.started)
            self._tell(chosen, workers, point, result)
        return bool(ended)

    def _tell(self, chosen: Sequence[Series], workers: int, point: Point, result: Result) -> None:
        left = len(self._missing(chosen))
        total = len({point.key for series in chosen for point in self.wanted(series)})
        what = f"loss {result.text}" if result.status != FAILED else f"failed: {last_line(self.folder / point.name)}"
        remaining = left * sum(self._seconds) / len(self._seconds) / workers
        eta = f"eta {math.ceil(remaining / 60)} min" if left else "done"
        self._say(f"[{total - left}/{total}] {point.method} {point.name} {what} | {self._seconds[-1]:.0f} s | {eta}")

    def _end_all(self) -> None:
        """End what still runs; its folders have no result, so that it will run again."""
        for training in self._running:
            training.process.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        for training in self._running:
            with suppress(subprocess.TimeoutExpired):
                training.process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(training.process.pid, signal.SIGKILL)
            training.process.wait()
            training.lock.close()
        self._running.clear()


def _clean_folder(folder: Path) -> TextIO:
    """Empty a run's folder and return its lock, which no other process holds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; name another --output") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(
            f"the training in {folder} is being run by another process, of this sweep or of an earlier one; wait until"
            " it has ended, or end it"
        ) from None
    except OSError:  # a file system without locks
        pass
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def _environment(slot: int, ranks: int) -> dict[str, str]:
    """One thread a rank; of several devices in CUDA_VISIBLE_DEVICES, each worker gets its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(devices) > 1:
        own = [devices[(slot * ranks + rank) % len(devices)] for rank in range(ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


@contextmanager
def _term_is_interrupt() -> Iterator[None]:
    """Have SIGTERM end the trainings and write the table, as SIGINT does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
