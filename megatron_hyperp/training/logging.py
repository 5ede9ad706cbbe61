"""What a run tells: ``metrics.jsonl``, TensorBoard and Weights & Biases files, and lines for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperp.config import Config

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics in order; where a resumed run repeated an iteration, its last row counts.

    A last line that a killed run left half written is passed over.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["iteration"], "eval" if "eval_loss" in row else "train"] = row
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1] == "train"))]


class MetricsWriter:
    """Writes rows of metrics wherever the config asks; made on every rank, active on rank 0.

    Args:
        config: resolved config.
        active: whether this rank writes.
        fresh: the run starts from scratch: metrics of an earlier run in the folder are kept under another name.
        run_id: Weights & Biases run to continue.
    """

    def __init__(self, config: Config, *, active: bool, fresh: bool, run_id: str | None = None) -> None:
        self.run_id = run_id
        self._file: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not active:
            return
        path = Path(config.logging.run_dir) / METRICS_FILE
        if fresh and path.exists():
            os.replace(path, _unused_name(path))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (closed in close)
        if self._file.tell() and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")  # a killed run left half a line
        if config.logging.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(config.logging.tensorboard_dir)
        if config.logging.wandb_project:
            self._start_wandb(config)

    def _start_wandb(self, config: Config) -> None:
        import wandb

        try:
            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_exp_name or Path(config.logging.run_dir).name,
                dir=config.logging.run_dir,
                id=self.run_id,
                resume="allow",
                config=config.to_dict(),
            )
            self.run_id = self._wandb.id
        except Exception as error:  # a logging service must not take the training down with it
            print(f"wandb does not start ({error}); the run goes on without it", file=sys.stderr)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; ``iteration`` is its position on the time axis.

        Its values are numbers, or lists of finite numbers, which go to metrics.jsonl alone.
        """
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        plain = {
            name: value if isinstance(value, list) or math.isfinite(value) else None for name, value in row.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        values = {name: value for name, value in row.items() if name != "iteration" and not isinstance(value, list)}
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, row["iteration"])
        if self._wandb is not None:
            try:
                self._wandb.log(values, step=int(row["iteration"]))
            except Exception as error:
                print(f"wandb stopped ({error}); the run goes on without it", file=sys.stderr)
                self._wandb = None

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _unused_name(path: Path) -> Path:
    number = 1
    while path.with_suffix(f".{number}{path.suffix}").exists():
        number += 1
    return path.with_suffix(f".{number}{path.suffix}")


class Console:
    """Lines for people on rank 0: a progress bar on a terminal, plain lines in a log.

    Args:
        active: whether this rank prints.
        total: iterations of the run.
    """

    def __init__(self, *, active: bool, total: int = 0) -> None:
        self._active = active
        self._total = total
        self._progress: Any = None
        self._task: Any = None
        self._smoothed: float | None = None
        self._started = time.monotonic()
        self._first: int | None = None

    def start_bar(self, done: int) -> None:
        """Show a progress bar if this is a terminal."""
        if self._active and sys.stdout.isatty():
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

    def print(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        if self._active:
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
            f"iteration {iteration}/{self._total} ({100 * iteration / self._total:.0f}%)",
            f"loss {loss:.4f} (smoothed {self._smoothed:.4f})",
            f"lr {row['lr']:.3e}",
            f"grad {row['grad_norm']:.3f}",
            f"{row['tokens_per_s']:,.0f} tok/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {100 * row['mfu']:.1f}%")
        if iteration > self._first:
            parts.append(f"ETA {_duration(pace * (self._total - iteration))}")
        if row["skipped"]:
            parts.append(f"skipped {row['skipped']}")
        line = " | ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration, description=" | ".join(parts[1:5]))
        else:
            self.print(line)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
