"""Faults that are planted in a rank before it begins. Each is a plain object, so that it can be sent there."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# Parts of the training, by the files whose lines are counted.
PLACES = {
    "save": ("training/saving.py", "hyperp/checksums.py", "hyperp/files.py"),
    "load": ("training/checkpointing.py", "training/compatibility.py", "hyperp/pickles.py"),
    "datasets": ("data/datasets.py", "data/indexed.py", "data/batches.py"),
    "optimizer": ("optim/distributed.py", "optim/buckets.py", "optim/muonh.py", "optim/data_parallel.py"),
    "loop": ("training/loop.py", "training/pretrain.py", "training/logging.py", "training/meter.py"),
}


@dataclass(frozen=True)
class AtLine:
    """A signal at the n-th line that is executed in a part of the training.

    Attributes:
        place: of ``PLACES``.
        share: which of the lines, from 0 for the first to 1 for the last of ``lines``.
        lines: executed there in an undisturbed run, as counted by :class:`Lines`.
        number: of the signal to this process.
    """

    place: str
    share: float
    lines: int
    number: int = signal.SIGKILL

    def __call__(self) -> None:
        """Count from now on."""
        last = max(1, round(self.share * self.lines))
        count = 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            if event == "line":
                count += 1
                if count == last:
                    os.kill(os.getpid(), self.number)
            return line

        _trace(self.place, line)


@dataclass(frozen=True)
class Lines:
    """Counts the lines of all places, and writes the counts when the process ends.

    Attributes:
        file: that the counts go to, as ``place count`` lines.
    """

    file: Path

    def __call__(self) -> None:
        """Count from now on."""
        import atexit

        counts = dict.fromkeys(PLACES, 0)
        pid = os.getpid()

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            name = frame.f_code.co_filename
            place = next((place for place, files in PLACES.items() if name.endswith(files)), None)
            if place is None:
                return None

            def line(frame: FrameType, event: str, argument: Any) -> Any:
                counts[place] += event == "line"
                return line

            return line

        def write() -> None:
            if os.getpid() == pid:
                self.file.write_text("".join(f"{place} {count}\n" for place, count in counts.items()))

        # Processes of multiprocessing leave without atexit.
        from multiprocessing import util

        util.Finalize(None, write, exitpriority=0)
        atexit.register(write)
        sys.settrace(enter)


def _trace(place: str, line: Any) -> None:
    files = PLACES[place]
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.endswith(files) else None)


@dataclass(frozen=True)
class Clock:
    """A clock that jumps at a step.

    Attributes:
        seconds: it jumps by.
        calls: of ``time.time`` until then.
    """

    seconds: float
    calls: int = 50

    def __call__(self) -> None:
        """Put the other clock in its place."""
        honest, left = time.time, [self.calls]

        def jumping() -> float:
            left[0] -= 1
            return honest() + (self.seconds if left[0] < 0 else 0)

        time.time = jumping


@dataclass(frozen=True)
class Planted:
    """A number in a tensor at one step.

    Attributes:
        where: "gradient", "weight", "master" (the owner's fp32 weight) or "batch" (its mask).
        value: that is planted.
        step: of this process at which, from 1.
    """

    where: str
    value: float
    step: int

    def __call__(self) -> None:
        """Have the trainer's step plant it."""
        from megatron_hyperp.training import loop

        done = [0]
        original = loop.Trainer._train_batch

        def train_batch(trainer: Any, batches: Any) -> Any:
            done[0] += 1
            due = done[0] == self.step
            if due and self.where == "weight":
                _first(trainer).data.view(-1)[3] = self.value
            if due and self.where == "master":
                _master(trainer).view(-1)[3] = self.value
            if due and self.where == "batch":
                batches = [map(self._spoil, iterator) for iterator in batches]
            hook = _first(trainer).register_hook(self._spoil_gradient) if due and self.where == "gradient" else None
            result = original(trainer, batches)
            if hook is not None:
                hook.remove()
            return result

        loop.Trainer._train_batch = train_batch  # type: ignore[method-assign]

    def _spoil_gradient(self, gradient: Any) -> Any:
        gradient = gradient.clone()
        gradient.view(-1)[3] = self.value
        return gradient

    def _spoil(self, batch: dict[str, Any]) -> dict[str, Any]:
        mask = batch["loss_mask"].clone()
        mask.view(-1)[5] = self.value
        return {**batch, "loss_mask": mask}


def _first(trainer: Any) -> Any:
    return next(iter(trainer.chunks[0].parameters()))


def _master(trainer: Any) -> Any:
    return next(family.master for family in trainer.optimizer.families if family.master.numel())


@dataclass(frozen=True)
class FailingCall:
    """An ``OSError`` from the n-th call of a function of ``os``, as a failing disk gives it.

    Attributes:
        name: of the function.
        call: which one, from 1.
        code: of errno.
    """

    name: str
    call: int
    code: int = errno.EIO

    def __call__(self) -> None:
        """Put the failing function in its place."""
        original, left = getattr(os, self.name), [self.call]

        def failing(*words: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(self.code, os.strerror(self.code))
            return original(*words, **named)

        setattr(os, self.name, failing)
