"""Faults that are planted in a rank before it begins. Each is a plain object, so that it can be sent there."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import util
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

# Environment variable: the file that holds the time of a rank's fault.
STRUCK = "FAULT_STRUCK"


def note_strike() -> None:
    """Write down that the fault strikes now."""
    Path(os.environ[STRUCK]).write_text(str(time.monotonic()))


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
        last, count = max(1, round(self.share * self.lines)), 0

        def strike(place: str) -> None:
            nonlocal count
            count += place == self.place
            if place == self.place and count == last:
                note_strike()
                os.kill(os.getpid(), self.number)

        _on_lines(strike)


@dataclass(frozen=True)
class Lines:
    """Counts the lines of all places, and writes the counts when the process ends.

    Attributes:
        file: that the counts go to, as ``place count`` lines.
    """

    file: Path

    def __call__(self) -> None:
        """Count from now on."""
        counts: Counter[str] = Counter()

        def write() -> None:
            self.file.write_text("".join(f"{place} {counts[place]}\n" for place in PLACES))

        # Processes of multiprocessing leave without atexit; those that are forked later have no part in it.
        util.Finalize(None, write, exitpriority=0)
        _on_lines(lambda place: counts.update([place]))


def _on_lines(act: Callable[[str], None]) -> None:
    """Have ``act`` called with the place of each line of ``PLACES`` that this thread executes; not in its children."""

    def watching(place: str) -> Any:
        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                act(place)
            return line

        return line

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        place = next((place for place, files in PLACES.items() if name.endswith(files)), None)
        return watching(place) if place else None

    os.register_at_fork(after_in_child=lambda: sys.settrace(None))
    sys.settrace(enter)


@dataclass(frozen=True)
class Clock:
    """A clock that jumps at a step.

    Attributes:
        seconds: it jumps by.
        proof: a file that is there once it has jumped.
        calls: of ``time.time`` until then.
    """

    seconds: float
    proof: Path
    calls: int = 50

    def __call__(self) -> None:
        """Put the other clock in its place."""
        honest, left = time.time, [self.calls]

        def jumping() -> float:
            left[0] -= 1
            if left[0] == -1:
                self.proof.touch()
            return honest() + (self.seconds if left[0] < 0 else 0)

        time.time = jumping


# The trainer's step: it takes the trainer and its batches.
Step = Callable[[Any, Any], Any]


def _replace_step(number: int, take: Callable[[Step, Any, Any], Any]) -> None:
    """Have ``take(original, trainer, batches)`` replace one step of this process, counted from 1."""
    from megatron_hyperp.training import loop

    original, done = loop.Trainer._train_batch, [0]

    def train_batch(trainer: Any, batches: Any) -> Any:
        done[0] += 1
        return take(original, trainer, batches) if done[0] == number else original(trainer, batches)

    loop.Trainer._train_batch = train_batch  # type: ignore[method-assign]


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
        _replace_step(self.step, self._take)

    def _take(self, step: Step, trainer: Any, batches: Any) -> Any:
        note_strike()
        if self.where == "weight":
            _first(trainer).data.view(-1)[3] = self.value
        if self.where == "master":
            _master(trainer).view(-1)[3] = self.value
        if self.where == "batch":
            batches = [map(self._spoil, iterator) for iterator in batches]
        hook = _first(trainer).register_hook(self._spoil_gradient) if self.where == "gradient" else None
        result = step(trainer, batches)
        if hook is not None:
            hook.remove()
        return result

    def _spoil_gradient(self, gradient: Any) -> Any:
        gradient = gradient.clone()
        gradient.view(-1)[3] = self.value
        return gradient

    def _spoil(self, batch: dict[str, Any]) -> dict[str, Any]:
        mask = batch["loss_mask"].clone()
        mask.view(-1)[5] = self.value
        return {**batch, "loss_mask": mask}


@dataclass(frozen=True)
class Raised:
    """An exception in a step.

    Attributes:
        error: that is raised.
        step: of this process in which, from 1.
    """

    error: BaseException
    step: int

    def __call__(self) -> None:
        """Have the trainer's step raise it, after a batch was drawn."""
        _replace_step(self.step, self._take)

    def _take(self, step: Step, trainer: Any, batches: Any) -> Any:
        next(batches[0])
        note_strike()
        raise self.error


@dataclass(frozen=True)
class Flipped:
    """One bit of a weight, on this rank alone.

    Attributes:
        save: before the save of which number, from 1; 0: after a backward pass.
        step: after the backward pass of which step of this process, from 1.
        proof: a file that is there once it has flipped.
    """

    save: int
    step: int
    proof: Path

    def __call__(self) -> None:
        """Have the trainer's step, or its save, flip it."""
        from megatron_hyperp.training import loop

        name, due = ("_save", self.save) if self.save else ("_train_batch", self.step)
        done, original = [0], getattr(loop.Trainer, name)

        def flip(trainer: Any) -> None:
            import torch

            trainer.optimizer.exchange.finish_param_sync()
            content = _first(trainer).data.view(-1).view(torch.uint8)
            content[len(content) // 2] ^= 1
            note_strike()
            self.proof.touch()

        def flipping(trainer: Any, *words: Any) -> Any:
            done[0] += 1
            if self.save and done[0] == due:
                flip(trainer)
            result = original(trainer, *words)
            if not self.save and done[0] == due:
                flip(trainer)
            return result

        setattr(loop.Trainer, name, flipping)


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
        proof: a file that is there once it has failed.
        code: of errno.
    """

    name: str
    call: int
    proof: Path
    code: int = errno.EIO

    def __call__(self) -> None:
        """Put the failing function in its place."""
        original, left = getattr(os, self.name), [self.call]

        def failing(*words: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                note_strike()
                self.proof.touch()
                raise OSError(self.code, os.strerror(self.code))
            return original(*words, **named)

        setattr(os, self.name, failing)
