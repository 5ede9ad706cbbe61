"""What one log line of a training reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from megatron_hyperp import device, estimate

if TYPE_CHECKING:
    from megatron_hyperp.training.loop import Trainer


class Meter:
    """Gathers what one log line reports.

    Args:
        trainer: the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clear()

    def _clear(self) -> None:
        self._losses = torch.zeros(2, dtype=torch.float64, device=device.device())
        self._tokens = 0
        self._seconds = 0.0
        self._mark = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training; work that the device still does for training counts."""
        self._read_clock()
        yield
        self._mark = time.monotonic()

    def _read_clock(self) -> None:
        device.synchronize()
        now = time.monotonic()
        self._seconds += now - self._mark
        self._mark = now

    def add(self, losses: torch.Tensor, lr: float, grad_norm: float) -> None:
        """Take in one iteration."""
        self._losses += losses
        self._tokens += self._trainer.config.batch_tokens
        self._lr, self._grad_norm = lr, grad_norm

    def report(self) -> dict[str, Any]:
        """Write, print and return the interval's row; a collective call."""
        trainer, config = self._trainer, self._trainer.config
        self._read_clock()
        row: dict[str, Any] = {
            "iteration": trainer.progress.iteration,
            "tokens": trainer.progress.consumed_tokens,
            "loss": trainer.global_mean(self._losses),
            "lr": self._lr,
            "grad_norm": self._grad_norm,
            "tokens_per_s": self._tokens / max(self._seconds, 1e-9),
            "radius_drift": trainer.optimizer.radius_drift(),
            "idle_matrices": trainer.optimizer.idle_matrices(),
            "skipped": trainer.optimizer.steps_skipped,
        }
        if trainer.balance is not None:
            row.update(trainer.balance.metrics())
        peak = config.logging.peak_tflops or device.peak_tflops()
        if peak:
            flops = estimate.train_flops_per_token(config.model, config.moe) * row["tokens_per_s"]
            row["mfu"] = flops / (peak * 1e12 * trainer.world_size)
        trainer.writer.write(row)
        trainer.console.status(row)
        self._clear()
        return row
