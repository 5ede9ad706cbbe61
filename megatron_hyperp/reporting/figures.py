"""Lines over tokens and FLOPs: what a panel shows, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hyperp.parameters import GROUPS
from megatron_hyperp.reporting.drawing import MOST_LABELLED, canvas, colours, data_uri, end_labels, plain_numbers
from megatron_hyperp.reporting.runs import Run

SIZE = (4.9, 2.7)
# From this ratio of largest to smallest on, a panel that may be logarithmic is.
LOGARITHMIC_FROM = 20.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel.

    Attributes:
        name: of the run.
        colour: of the run.
        x: tokens or FLOPs.
        y: values; NaN where there is none.
        faint: thin and unlabelled, behind another line of the run.
    """

    name: str
    colour: str
    x: list[float]
    y: list[float]
    faint: bool = False

    def points(self) -> list[tuple[float, float]]:
        """The finite ones."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of lines.

    Attributes:
        title: what is drawn, with its unit.
        lines: of runs.
        x: "tokens" or "FLOPs".
        log: whether y may be logarithmic.
        log_x: whether x is.
        key: metric, for finding the panel.
    """

    key: str
    title: str
    lines: list[Line] = field(default_factory=list)
    x: str = "tokens"
    log: bool = False
    log_x: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(line.points() for line in self.lines)


def metric_panel(runs: Sequence[Run], key: str, title: str, *, log: bool = False, factor: float = 1.0) -> Panel:
    """A metric of all runs over tokens."""
    lines = []
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        x, y = run.series(key)
        lines.append(Line(run.name, colour, x, [factor * value for value in y]))
    return Panel(key, title, lines, log=log)


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """Training (faint) and held-out losses over tokens, and over FLOPs where sizes are known."""
    over_tokens: list[Line] = []
    over_flops: list[Line] = []
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        held_out = bool(run.evaluations)
        for key, faint in (("loss", held_out), ("eval_loss", False)):
            x, y = run.series(key)
            over_tokens.append(Line(run.name, colour, x, y, faint))
            if run.size is not None:
                flops = [run.size.flops_per_token * tokens for tokens in x]
                # The loss before training has no place on a logarithmic axis.
                kept = [(at, value) for at, value in zip(flops, y, strict=True) if at > 0]
                over_flops.append(Line(run.name, colour, [at for at, _ in kept], [value for _, value in kept], faint))
    title = "Loss (nats per token): held out, training faint"
    return [
        Panel("loss", title, over_tokens, log=True),
        Panel("loss_flops", title, over_flops, x="FLOPs", log=True, log_x=True),
    ]


def main_panels(runs: Sequence[Run]) -> list[Panel]:
    """What every run has, if it got that far; panels without a point are left out."""
    panels = [
        *loss_panels(runs),
        metric_panel(runs, "lr", "Learning rate"),
        metric_panel(runs, "grad_norm", "Gradient norm before clipping", log=True),
        metric_panel(runs, "tokens_per_s", "Throughput (tokens per second)"),
        metric_panel(runs, "mfu", "Model FLOPs utilization (%)", factor=100),
        metric_panel(runs, "radius_drift", "Radius drift: largest | ‖W‖/R - 1 |", log=True),
    ]
    return [panel for panel in panels if not panel.empty]


def gradient_panels(runs: Sequence[Run]) -> list[Panel]:
    """The gradient norm of each group of parameters that a run has."""
    panels = [metric_panel(runs, f"grad_norm_{group}", f"Gradient norm: {group}", log=True) for group in GROUPS]
    return [panel for panel in panels if not panel.empty]


def draw(axis: Any, panel: Panel) -> None:
    """Draw a panel on matplotlib axes."""
    for line in panel.lines:
        style: dict[str, Any] = {"color": line.colour}
        if line.faint:
            style |= {"alpha": 0.4, "linewidth": 0.9}
        elif len(line.points()) <= 40:
            style["marker"] = "o"
        axis.plot(line.x, line.y, **style)
    if not panel.empty:
        _scale(axis, panel)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel(panel.x)
    ends = [(*line.points()[-1], line.name, line.colour) for line in panel.lines if not line.faint and line.points()]
    if _labelled(panel):
        end_labels(axis, ends)


def _labelled(panel: Panel) -> bool:
    """Whether names stand at the ends of lines: there are several runs, but not too many."""
    return 1 < len({line.name for line in panel.lines}) <= MOST_LABELLED


def _scale(axis: Any, panel: Panel) -> None:
    values = [y for line in panel.lines for _, y in line.points()]
    positive = [value for value in values if value > 0]
    if panel.log and positive and max(positive) >= LOGARITHMIC_FROM * min(positive):
        axis.set_yscale("log", nonpositive="mask")
    elif min(values) >= 0 and (max(values) == 0 or min(values) < 0.3 * max(values)):
        axis.set_ylim(bottom=0)
    if axis.get_yscale() == "linear":
        plain_numbers(axis.yaxis)
    if panel.log_x:
        axis.set_xscale("log", nonpositive="mask")
        return
    # Lines end at the right border, where their names are.
    last = max(x for line in panel.lines for x, _ in line.points())
    axis.set_xlim(0, last if last > 0 else 1)
    plain_numbers(axis.xaxis)


def to_svg(panel: Panel) -> str:
    """Return a panel as a data URI."""
    labelled = _labelled(panel)
    with canvas(SIZE, margins=(0.6, 1.3 if labelled else 0.2, 0.55, 0.3)) as (figure, axes):
        draw(axes[0, 0], panel)
        return data_uri(figure, "svg")


def write_png(panels: Sequence[Panel], output: Path, across: int = 2) -> None:
    """Write panels side by side as a PNG."""
    across = max(1, min(across, len(panels)))
    rows = max(1, math.ceil(len(panels) / across))
    with canvas((SIZE[0] * across + 0.5, SIZE[1] * rows), rows, across) as (figure, axes):
        for axis, panel in zip(axes.flat, panels, strict=False):
            draw(axis, panel)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.savefig(output, dpi=130)
