"""The picture of a run: output RMS over K, untrained and trained, and losses over learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]
COLOURS = {"sqrt": "C0", "softmax": "C1"}
NAMES = {"sqrt": "SqrtGate", "softmax": "softmax"}


def draw(parts: Mapping[str, Sequence[Row]], output: Path) -> None:
    """Write a PNG with a panel for each part that was run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"start": draw_start, "trained": draw_trained, "transfer": draw_transfer}
    figure, axes = plt.subplots(1, len(parts), figsize=(5 * len(parts), 4), layout="constrained", squeeze=False)
    for axis, (part, rows) in zip(axes[0], parts.items(), strict=True):
        panels[part](axis, rows)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def draw_start(axis: Any, rows: Sequence[Row]) -> None:
    """RMS at the start, relative to the smallest K, with what uncorrelated experts give."""
    for gate, colour in COLOURS.items():
        for shared in (False, True):
            mine = [row for row in rows if row["gate"] == gate and row["shared"] == shared]
            topk = [row["K"] for row in mine]
            name = NAMES[gate] + (", shared expert" if shared else "")
            marker = "s" if shared else "o"
            axis.plot(topk, [row["random rms ratio"] for row in mine], colour, marker=marker, label=name, linewidth=0)
            axis.plot(topk, [row["rms ratio"] for row in mine], colour, marker=marker, fillstyle="none", linewidth=0)
            law = [uncorrelated(k, gate, shared) / uncorrelated(topk[0], gate, shared) for k in topk]
            axis.plot(topk, law, colour, linewidth=1, linestyle="--" if shared else "-")
    axis.plot([], [], "ko", fillstyle="none", linewidth=0, label="in the model (full: random inputs)")
    over_topk(axis, rows, "RMS at the start, relative to the least K (lines: laws)")


def uncorrelated(topk: int, gate: str, shared: bool) -> float:
    """RMS of the output, relative to that of one expert, if experts are uncorrelated and gates equal."""
    routed = 1.0 if gate == "sqrt" else 1 / (topk - shared)
    return ((routed + 1) / 2 if shared else routed) ** 0.5


def draw_trained(axis: Any, rows: Sequence[Row]) -> None:
    """RMS and coherence after training."""
    for gate, colour in COLOURS.items():
        mine = [row for row in rows if row["gate"] == gate]
        topk = [row["K"] for row in mine]
        axis.plot(topk, [row["rms ratio"] for row in mine], colour, marker="o", label=NAMES[gate])
        coherence = [row["coherence"] for row in mine]
        axis.plot(topk, coherence, colour, marker="^", linestyle=":", label=f"{NAMES[gate]}, coherence")
    over_topk(axis, rows, "RMS after training, relative; coherence")


def over_topk(axis: Any, rows: Sequence[Row], title: str) -> None:
    """Label an axis of K."""
    topk = sorted({row["K"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(topk, topk)
    axis.set_xlabel("K")
    axis.set_title(title, loc="left", fontsize=10)


def draw_transfer(axis: Any, rows: Sequence[Row]) -> None:
    """Held-out losses."""
    for gate, colour in COLOURS.items():
        mine = [row for row in rows if row["gate"] == gate]
        for style, topk in zip(("-", "--", ":"), sorted({row["K"] for row in mine}), strict=False):
            of_lr: dict[float, list[float]] = {}
            for row in (row for row in mine if row["K"] == topk):
                of_lr.setdefault(row["lr"], []).append(row["loss"])
            curve = sorted((lr, mean(losses)) for lr, losses in of_lr.items())
            label = f"{NAMES[gate]}, K = {topk}"
            axis.plot(
                [lr for lr, _ in curve], [loss for _, loss in curve], colour, linestyle=style, marker=".", label=label
            )
    axis.set_xscale("log", base=2)
    lrs = sorted({row["lr"] for row in rows})
    axis.set_xticks(lrs, [f"{lr:.3g}" for lr in lrs])
    axis.set_xlabel("learning rate")
    axis.set_title("Held-out loss", loc="left", fontsize=10)
