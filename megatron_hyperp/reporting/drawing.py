"""How pictures look: style, colours, labels at the ends of lines, files and data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart, less yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Of heatmaps: as light grows, so does the value, for every eye.
COLOUR_MAP = "viridis"
MISSING = "#e4e4e4"
# Most runs whose lines are labelled at their ends; more would not fit beside a panel.
MOST_LABELLED = 10
LONGEST_LABEL = 16
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "axes.edgecolor": "#888888",
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    # Outlines rather than text: a page's picture looks alike on every machine.
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron-hyperp",
}


@contextmanager
def canvas(
    size: tuple[float, float], rows: int = 1, columns: int = 1, margins: tuple[float, ...] = ()
) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes [rows, columns]; closed afterwards.

    Args:
        size: width and height in inches.
        rows: of axes.
        columns: of axes.
        margins: left, right, bottom and top in inches, which is quick; without them matplotlib makes room.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        layout = None if margins else "constrained"
        figure, axes = plt.subplots(rows, columns, figsize=size, layout=layout, squeeze=False)
        if margins:
            left, right, bottom, top = margins
            width, height = size
            figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def colours(number: int) -> list[str]:
    """A colour for each run: distinct ones for a few, shades in order for many."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(matplotlib.colormaps["viridis"](0.92 * index / (number - 1))) for index in range(number)]


def data_uri(figure: Any, kind: str, dpi: float = 100) -> str:
    """Return a figure as a ``data:`` address: "svg" or "png"."""
    buffer = io.BytesIO()
    # No date inside: the same runs give the same bytes.
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def short(name: str, length: int = LONGEST_LABEL) -> str:
    """A name cut in its middle; its beginning and its end tell runs apart."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def amount(value: float, digits: int = 3) -> str:
    """A number in few characters: 250K, 1.2M, 10.4B, 0.015."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.3g}"


def plain_numbers(scale: Any) -> None:
    """Let a linear axis, ``axes.xaxis`` or ``axes.yaxis``, show :func:`amount` rather than a factor at its end."""
    from matplotlib.ticker import FuncFormatter

    scale.set_major_formatter(FuncFormatter(lambda value, _: amount(value, 4)))


def logarithmic_numbers(scale: Any) -> None:
    """Let a logarithmic axis show a few round numbers, also where it spans less than two decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    scale.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    plain_numbers(scale)
    scale.set_minor_formatter(NullFormatter())


def literal(text: str) -> str:
    """Text in which matplotlib sees no mathematics."""
    return text.replace("$", r"\$")


def end_labels(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names to the right of the axes at the height of their lines' ends, moved apart where they would overlap.

    Args:
        axis: with its limits and scales as they are to be.
        ends: x and y of the last point, name, colour.
    """
    to_axes = axis.transData + axis.transAxes.inverted()
    placed = []
    for x, y, name, colour in ends:
        height = float(to_axes.transform((x, y))[1])
        if math.isfinite(height):
            placed.append((min(max(height, 0.0), 1.0), name, colour))
    placed.sort()
    for (height, name, colour), at in zip(placed, spread([height for height, _, _ in placed], 0.085), strict=True):
        style = {"color": colour, "linewidth": 1.6, "transform": axis.transAxes, "clip_on": False}
        axis.plot([1.005, 1.05], [height, at], scalex=False, scaley=False, **style)
        axis.text(1.06, at, literal(short(name)), transform=axis.transAxes, va="center", ha="left", fontsize=8.5)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return rising heights moved so little that neighbours are a gap apart, within 0 and 1 if they fit."""
    moved = list(heights)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    if moved and moved[-1] > 1.0:
        moved[-1] = 1.0
        for index in range(len(moved) - 2, -1, -1):
            moved[index] = min(moved[index], moved[index + 1] - gap)
    return moved
