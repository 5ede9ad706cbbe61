"""Layers over tokens as heatmaps, one for each run, on a scale that all runs share; and the loads of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hyperp.reporting.drawing import (
    COLOUR_MAP,
    MISSING,
    canvas,
    data_uri,
    literal,
    logarithmic_numbers,
    plain_numbers,
    short,
)
from megatron_hyperp.reporting.runs import PER_LAYER, Row, Run, number

Array = np.ndarray[Any, np.dtype[np.float64]]
SIZE = (3.0, 1.9)
MARGINS = (0.45, 0.15, 0.55, 0.27)
# Columns of a heatmap; of longer runs every so many-th row is drawn.
MOST_COLUMNS = 300
LOGARITHMIC_FROM = 50.0
# Indicators in the order of the page: title, and whether the figure of the model is the mean over layers.
INDICATORS = {
    "attention_z": ("Attention Z", "mean squared log-sum-exp of the attention logits"),
    "router_z": ("Router Z", "mean squared log-sum-exp of the router's logits"),
    "output_z": ("Output Z", "mean squared log-sum-exp of the output logits; of the model, not of a layer"),
    "attention_rms": ("Attention output RMS", "of what the attention block adds to the residual stream"),
    "mlp_rms": ("MLP output RMS", "of what the MLP or the experts add to the residual stream"),
    "attention_outliers": ("Attention outliers", "share of elements beyond 5 sigma of their token"),
    "mlp_outliers": ("MLP outliers", "share of elements beyond 5 sigma of their token"),
    "angle_attention": ("Angle of a step: attention", "radians; largest of the layer's matrices, and of the layers"),
    "angle_mlp": ("Angle of a step: MLP", "radians; largest of the layer's matrices, and of the layers"),
    "angle_experts": ("Angle of a step: experts", "radians; largest of the layer's matrices, and of the layers"),
    "angle_router": ("Angle of a step: router", "radians; largest of the layers"),
    "radius_drift": ("Radius drift", "largest | ‖W‖/R - 1 | of the layer's matrices, and of the model"),
    "max_vio": ("MaxVio", "(largest - mean load of an expert) / mean load; largest of the layers"),
}


@dataclass(frozen=True, slots=True)
class Heat:
    """A matrix over tokens.

    Attributes:
        run: its name.
        edges: tokens at the borders of the columns, [columns + 1].
        values: [rows, columns]; row 0 is drawn lowest.
        rows: what a row is: "layer" or "expert".
    """

    run: str
    edges: Array
    values: Array
    rows: str = "layer"


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours that several heatmaps share.

    Attributes:
        low: value of the darkest colour.
        high: value of the lightest.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    log: bool

    def norm(self) -> Any:
        """For matplotlib."""
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high)


def indicators(runs: Sequence[Run]) -> list[str]:
    """Return the indicators that a run has, per layer or of the model, known ones first and in the page's order."""
    keys = {key.removesuffix(PER_LAYER) for run in runs for row in run.stability for key in row}
    layered = {key.removesuffix(PER_LAYER) for run in runs for row in run.stability for key in row if PER_LAYER in key}
    known = [key for key in INDICATORS if key in keys]
    return [*known, *sorted(layered - set(known))]


def heat(run: Run, key: str) -> Heat | None:
    """Return a per-layer indicator of a run over tokens; None if it has none, or nothing but zeros."""
    rows = [row for row in run.stability if isinstance(row.get(key + PER_LAYER), list)]
    return _over_tokens(run.name, [(row, row[key + PER_LAYER]) for row in rows], "layer")


def _over_tokens(name: str, columns: Sequence[tuple[Row, list[Any]]], rows: str) -> Heat | None:
    height = max((len(values) for _, values in columns), default=0)
    tokens: list[float] = []
    kept: list[list[float]] = []
    for row, values in columns:
        at = number(row.get("tokens"))
        if len(values) == height and math.isfinite(at) and (not tokens or at > tokens[-1]):
            tokens.append(at)
            kept.append([number(value) for value in values])
    if not height or not kept:
        return None
    step = math.ceil(len(kept) / MOST_COLUMNS)
    tokens, kept = tokens[::-1][::step][::-1], kept[::-1][::step][::-1]
    matrix = np.array(kept, dtype=np.float64).T
    if not np.nan_to_num(matrix).any():
        return None
    return Heat(name, _edges(tokens), matrix, rows)


def _edges(centres: Sequence[float]) -> Array:
    """Borders half way between neighbours."""
    at = np.asarray(centres, dtype=np.float64)
    if len(at) == 1:
        return np.array([0.0, at[0] or 1.0])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[max(0.0, at[0] - (middle[0] - at[0]))], middle, [at[-1]]])


def load_over_time(run: Run) -> tuple[int, Heat] | None:
    """Return the layer, from 1, whose experts are loaded least evenly at the end, and their loads over mean load."""
    rows = [row for row in run.training if _loads(row) is not None]
    if not rows:
        return None
    last = _loads(rows[-1])
    assert last is not None
    layer = int(last.max(axis=1).argmax())
    columns = [
        (row, loads[layer].tolist()) for row in rows if (loads := _loads(row)) is not None and len(loads) > layer
    ]
    found = _over_tokens(run.name, columns, "expert")
    return (layer + 1, found) if found else None


def load_at_end(run: Run) -> Array | None:
    """Return loads over mean load of the last row, [layers, experts]."""
    found = [loads for row in run.training if (loads := _loads(row)) is not None]
    return found[-1] if found else None


def _loads(row: Row) -> Array | None:
    """Loads over each layer's mean load; None if a row has none, or they are no rectangle of numbers."""
    try:
        counts = np.array(row["tokens_per_expert"], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        return None
    if counts.ndim != 2 or not counts.size:
        return None
    loads: Array = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-30)
    return loads


def common_scale(matrices: Sequence[Array], *, log: bool = True) -> Scale:
    """Return a scale for all values; logarithmic, if it may be, where they are positive and span decades."""
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if log and low > 0 and high >= LOGARITHMIC_FROM * low:
        return Scale(low, high, True)
    return Scale(min(low, 0.0) if low < 0.3 * high else low, high if high > low else low + (abs(low) or 1.0), False)


def draw(axis: Any, shown: Heat, scale: Scale, title: str = "") -> Any:
    """Draw a heatmap on matplotlib axes; row 1 lowest. Returns what a colour bar needs."""
    axis.set_facecolor(MISSING)
    axis.grid(False)
    rows = len(shown.values)
    mesh = axis.pcolormesh(
        shown.edges,
        np.arange(rows + 1) + 0.5,
        np.ma.masked_invalid(shown.values),
        cmap=COLOUR_MAP,
        norm=scale.norm(),
        rasterized=True,
    )
    _decorate(axis, rows, shown.rows, title or shown.run)
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_locator(_few_ticks(4))
    plain_numbers(axis.xaxis)
    return mesh


def draw_loads(axis: Any, loads: Array, scale: Scale, title: str) -> Any:
    """Draw the loads [layers, experts] at the end of a run."""
    axis.grid(False)
    edges = [np.arange(size + 1) + 0.5 for size in loads.shape]
    mesh = axis.pcolormesh(edges[1], edges[0], loads, cmap=COLOUR_MAP, norm=scale.norm(), rasterized=True)
    _decorate(axis, len(loads), "layer", title)
    axis.set_xlabel("expert")
    axis.xaxis.set_major_locator(_few_ticks(8, whole=True))
    return mesh


def _decorate(axis: Any, rows: int, name: str, title: str) -> None:
    axis.set_title(literal(short(title, 30)), loc="left")
    axis.set_ylabel(name)
    axis.set_ylim(0.5, rows + 0.5)
    if rows <= 4:
        axis.set_yticks(range(1, rows + 1))
    else:
        axis.yaxis.set_major_locator(_few_ticks(5, whole=True))


def _few_ticks(number_of: int, *, whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=number_of, integer=whole)


def to_png(shown: Heat, scale: Scale, title: str = "") -> str:
    """Return a heatmap as a data URI."""
    with canvas(SIZE, margins=MARGINS) as (figure, axes):
        draw(axes[0, 0], shown, scale, title)
        return data_uri(figure, "png", dpi=200)


def loads_to_png(loads: Array, scale: Scale, title: str) -> str:
    """Return the loads at the end of a run as a data URI."""
    with canvas(SIZE, margins=MARGINS) as (figure, axes):
        draw_loads(axes[0, 0], loads, scale, title)
        return data_uri(figure, "png", dpi=200)


def colour_bar(scale: Scale, label: str) -> str:
    """Return the colours of a scale, lying, as a data URI."""
    from matplotlib.cm import ScalarMappable

    with canvas((3.6, 0.68), margins=(0.2, 0.3, 0.27, 0.25)) as (figure, axes):
        axes[0, 0].grid(False)
        figure.colorbar(ScalarMappable(scale.norm(), COLOUR_MAP), cax=axes[0, 0], orientation="horizontal")
        (logarithmic_numbers if scale.log else plain_numbers)(axes[0, 0].xaxis)
        axes[0, 0].set_title(label, loc="left", fontsize=8.5)
        return data_uri(figure, "svg")


def write_png(rows: Sequence[tuple[str, Sequence[Heat]]], output: Path) -> None:
    """Write heatmaps as a PNG: a row for each indicator, with its colour bar at the right, a column for each run.

    Args:
        rows: title of an indicator, and its heatmaps, at least one.
        output: file.
    """
    from matplotlib.cm import ScalarMappable

    runs = list(dict.fromkeys(shown.run for _, heats in rows for shown in heats))
    width, height, bar = 2.6, 2.1, 0.9
    size = (width * len(runs) + bar, height * len(rows))
    with canvas(size, len(rows), len(runs), margins=(0.45, bar + 0.1, 0.55, 0.55)) as (figure, axes):
        figure.subplots_adjust(wspace=0.3, hspace=1.05)
        for line, (title, heats) in zip(axes, rows, strict=True):
            scale = common_scale([shown.values for shown in heats])
            found = {shown.run: shown for shown in heats}
            for axis, run in zip(line, runs, strict=True):
                if run in found:
                    draw(axis, found[run], scale)
                else:
                    axis.set_visible(False)
            place = line[0].get_position()
            figure.text(0.05 / size[0], place.y1 + 0.28 / size[1], literal(title), fontsize=11, fontweight="bold")
            place = line[-1].get_position()
            beside = figure.add_axes((place.x1 + 0.12 / size[0], place.y0, 0.12 / size[0], place.height))
            beside.grid(False)
            figure.colorbar(ScalarMappable(scale.norm(), COLOUR_MAP), cax=beside)
            (logarithmic_numbers if scale.log else plain_numbers)(beside.yaxis)
        figure.savefig(output, dpi=130)
