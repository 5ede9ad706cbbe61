"""Pictures of runs, from their ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.logging import METRICS_FILE, read_metrics

Row = dict[str, Any]


def load_run(run_dir: str | Path) -> list[Row]:
    """Return a run's rows of metrics.

    Raises:
        UsageError: the folder has no metrics, or none yet.
    """
    try:
        rows = read_metrics(run_dir)
    except OSError as error:
        raise UsageError(f"{run_dir} has no {METRICS_FILE} ({error.strerror}); give the --run-dir of a run") from error
    if not rows:
        raise UsageError(f"{Path(run_dir) / METRICS_FILE} is empty; wait for the run's first log line")
    return rows


def plot_runs(runs: dict[str, list[Row]], output: str | Path) -> None:
    """Write a PNG with training and held-out loss, learning rate, gradient norm and radius drift over tokens.

    Args:
        runs: rows of :func:`load_run` by the name to show.
        output: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    (loss, lr), (norm, drift) = axes
    for index, (name, rows) in enumerate(runs.items()):
        color = f"C{index}"
        training = [row for row in rows if "loss" in row]
        evaluations = [row for row in rows if "eval_loss" in row]
        _line(loss, training, "loss", color=color, alpha=0.5, linewidth=1, label=f"{name}: training")
        if evaluations and evaluations[-1]["eval_loss"] is not None:
            label = f"{name}: held out, at last {evaluations[-1]['eval_loss']:.3f}"
            _line(loss, evaluations, "eval_loss", color=color, marker="o", markersize=4, label=label)
        _line(lr, training, "lr", color=color, label=name)
        _line(norm, training, "grad_norm", color=color, label=name)
        _line(drift, training, "radius_drift", color=color, label=name)
    drift.axhline(1e-6, color="0.5", linestyle="--", linewidth=1, label="1e-6")
    panels = (
        (loss, "Loss (nats per token)", "linear"),
        (lr, "Learning rate", "linear"),
        (norm, "Gradient norm before clipping", "log"),
        (drift, "Radius drift, max of | ‖W‖/R - 1 |", "log"),
    )
    for axis, title, scale in panels:
        axis.set_title(title, loc="left", fontsize=11)
        if any(line.get_visible() and len(line.get_xdata()) for line in axis.get_lines()):
            axis.set_yscale(scale)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False, fontsize=9)
    drift.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("Tokens")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3), useMathText=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _line(axis: Any, rows: Sequence[Row], key: str, **style: Any) -> None:
    values = [math.nan if row[key] is None else row[key] for row in rows]
    axis.plot([row["tokens"] for row in rows], values, **style)


def summarize(rows: list[Row]) -> str:
    """Return one line on what a run achieved."""
    evaluations = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    training = [row for row in rows if row.get("loss") is not None]
    parts = []
    if training:
        last = training[-1]
        parts.append(f"{last['tokens']:,} tokens in {last['iteration']} iterations, training loss {last['loss']:.3f}")
        parts.append(f"radius drift at most {max(row['radius_drift'] for row in training):.1e}")
    if evaluations:
        share = 100 * evaluations[-1] / evaluations[0]
        parts.insert(
            0, f"held-out loss {evaluations[0]:.3f} -> {evaluations[-1]:.3f} ({share:.0f}% of its first value)"
        )
    return "; ".join(parts)
