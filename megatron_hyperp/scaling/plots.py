"""Pictures of fits, for a column of a paper: learning rates, their fall with tokens, loss over compute, leverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hyperp.scaling.analysis import LeveragePoint, LossFit, TokenFit, Tuned
from megatron_hyperp.scaling.groups import Group, shown
from megatron_hyperp.transfer import TOKEN_EXPONENT

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which the colour-blind tell apart, less yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Inches of a panel, and of the legend beside it; together they fill a column, and so many the width of a page.
PANEL = (2.2, 2.0)
LEGEND = 1.3
ACROSS = 2
# How columns are written in legends.
SYMBOLS = {"depth": "d", "hidden_size": "w", "tokens": "T", "moe_topk": "K"}
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "0.92",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.axisbelow": True,
    # Text stays text: searchable, and editable in vector programs.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextmanager
def panels(output: Path, number: int = 1) -> Iterator[list[Any]]:
    """Give axes of some panels to draw on, then write them to a file of one of :data:`FORMATS`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        columns = min(number, ACROSS)
        rows = math.ceil(number / columns)
        size = (columns * (PANEL[0] + LEGEND), rows * PANEL[1])
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[number:]:
            axis.set_visible(False)
        try:
            yield list(axes.flat[:number])
            figure.savefig(output, dpi=300)
        finally:
            plt.close(figure)


def label(axis: Any, *, x: str, y: str, title: str = "", legend: str = "") -> None:
    """Name the axes of a panel and set its legend, with a title of its own, beside the data."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, loc="left")
    style = {"borderaxespad": 0.0, "handlelength": 1.5, "title_fontsize": 7, "alignment": "left"}
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), title=legend, **style)


def logarithmic(scale: Any, show: Callable[[float], str], ticks: Sequence[float] = ()) -> None:
    """Make an axis logarithmic, with ticks of round numbers whatever its range, or with these ticks.

    Args:
        scale: ``axes.xaxis`` or ``axes.yaxis``.
        show: writes a tick's number.
        ticks: where they are to be.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    which = scale.axis_name
    getattr(scale.axes, f"set_{which}scale")("log")
    low, high = scale.get_view_interval()
    decades = math.log10(high / low)
    if not ticks and decades < 0.5:
        ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    elif not ticks:
        # The coarsest of these that shows three numbers.
        for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
            ticks = LogLocator(subs=subs).tick_values(low, high)
            if sum(low <= tick <= high for tick in ticks) >= 3:
                break
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    scale.set_ticks(inside, [show(tick) for tick in inside])
    scale.set_minor_locator(NullLocator())


def plain(value: float) -> str:
    """A tick's number."""
    return f"{value:.3g}"


def amount(value: float) -> str:
    """A number of tokens: 250K, 1M, 10.4B."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def power_of_ten(value: float) -> str:
    """A number of FLOPs."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10**exponent, 2)
    return (f"{factor:g}·" if factor != 1 else "") + f"$10^{{{exponent}}}$"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.1g}"


def _styles(number: int) -> list[dict[str, Any]]:
    """A colour and a marker for each of some lines: distinct ones for a few, shades in order for many."""
    if number <= len(COLOURS):
        return [{"color": COLOURS[index], "marker": MARKERS[index]} for index in range(number)]
    import matplotlib

    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, number))
    return [{"color": shade, "marker": MARKERS[index % len(MARKERS)]} for index, shade in enumerate(shades)]


def learning_rates(tuned: Sequence[Tuned], output: Path) -> None:
    """Loss over learning rate, a panel for each method: the runs, the parabolas in their windows, the optima."""
    methods = list(dict.fromkeys(entry.group.method for entry in tuned))
    with panels(output, len(methods)) as axes:
        for axis, method in zip(axes, methods, strict=True):
            own = [entry for entry in tuned if entry.group.method == method]
            varying = [name for name in own[0].group.key if len({entry.group.key[name] for entry in own}) > 1]
            for entry, style in zip(own, _styles(len(own)), strict=True):
                _learning_rate(axis, entry, style, _name(entry.group, varying) or method)
            if any(entry.optimum for entry in own):
                axis.plot([], [], "|", color="black", markersize=8, label="optimum")
            if not all(entry.optimum for entry in own):
                axis.plot([], [], ":", color="0.4", linewidth=0.8, label="none found")
            logarithmic(axis.xaxis, plain)
            legend = ", ".join(f"{name} {SYMBOLS[name]}" for name in varying if name in SYMBOLS).replace("_", " ")
            label(axis, x="learning rate", y="loss (nats per token)", title=method, legend=legend)


def _name(group: Group, columns: Sequence[str]) -> str:
    """What some columns of a group hold, in few characters."""
    values = {name: group.key[name] for name in columns}
    texts = {name: amount(float(value)) if name == "tokens" else shown(value) for name, value in values.items()}
    return ", ".join(f"{SYMBOLS.get(name, name)} {text}" for name, text in texts.items())


def _learning_rate(axis: Any, entry: Tuned, style: dict[str, Any], name: str) -> None:
    means = {lr: loss for lr, loss in entry.group.mean_losses().items() if math.isfinite(loss)}
    found = entry.optimum
    line = {"linestyle": "none"} if found else {"linestyle": ":", "linewidth": 0.8}
    axis.plot(list(means), list(means.values()), **style, **line, label=name)
    if found:
        x = np.geomspace(found.window[0], found.window[-1], 60)
        axis.plot(x, [found.loss_at(lr) for lr in x], color=style["color"])
        axis.plot(found.lr, found.loss, "|", color="black", markersize=7, markeredgewidth=1.2, zorder=4)


def token_exponents(fits: Sequence[TokenFit], output: Path) -> None:
    """The best learning rate over the tokens with the fitted law of each model, and the paper's exponent beside it."""
    measured: set[float] = set()
    with panels(output) as (axis,):
        for fit, style in zip(fits, _styles(len(fits)), strict=True):
            found = [(entry.group.number("tokens"), entry.optimum) for entry in fit.points if entry.optimum]
            if not found:
                continue
            tokens, lrs = [tokens for tokens, _ in found], [optimum.lr for _, optimum in found]
            errors = [
                lr * math.expm1(min(optimum.spread or 0.0, 1.0)) for lr, (_, optimum) in zip(lrs, found, strict=True)
            ]
            measured.update(tokens)
            columns = [name for name in fit.points[0].group.key if name not in ("method", "tokens")]
            name = f"{fit.method}, {_name(fit.points[0].group, columns)}"
            if fit.exponent:
                name += f"\n  x = {fit.exponent.value:.2f}{_spread(fit.exponent.spread)}"
                ends = [min(tokens), max(tokens)]
                axis.plot(ends, [fit.exponent.lr_at(end) for end in ends], color=style["color"])
                paper = [fit.exponent.lr * (end / fit.exponent.tokens) ** -TOKEN_EXPONENT for end in ends]
                axis.plot(ends, paper, color=style["color"], linestyle="--", linewidth=0.8)
            axis.errorbar(tokens, lrs, yerr=errors, linestyle="none", elinewidth=0.8, capsize=2, label=name, **style)
        axis.plot([], [], "--", color="0.4", linewidth=0.8, label=f"x = {TOKEN_EXPONENT:g} (paper)")
        logarithmic(axis.xaxis, amount, sorted(measured))
        logarithmic(axis.yaxis, plain)
        label(axis, x="training tokens T", y="best learning rate", title="best lr ~ $T^{-x}$")


def losses(fits: Sequence[LossFit], output: Path) -> None:
    """Each method's best loss over compute, with its law."""
    with panels(output) as (axis,):
        for fit, style in zip(fits, _styles(len(fits)), strict=True):
            name = fit.method
            if fit.law:
                name += f"\n  b = {fit.law.b:.3f}{_spread(fit.law.spread_b)}"
                name += f"\n  C = {fit.law.C:.2f}{_spread(fit.law.spread_C)}"
                x = np.geomspace(*fit.law.flops, 100)
                axis.plot(x, [fit.law.loss(flops) for flops in x], color=style["color"])
            axis.plot(list(fit.points), list(fit.points.values()), label=name, linestyle="none", **style)
        logarithmic(axis.xaxis, power_of_ten)
        logarithmic(axis.yaxis, plain)
        label(axis, x="training compute F (FLOPs)", y="loss (nats per token)", title="L = A F$^{-b}$ + C")


def leverages(points: Sequence[LeveragePoint], baseline: str, output: Path) -> None:
    """Compute leverage over the baseline: markers of measured losses, lines of each method's own law."""
    methods = list(dict.fromkeys(point.method for point in points if point.method != baseline))
    with panels(output) as (axis,):
        axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--", label=f"{baseline} (baseline)")
        for method, style in zip(methods, _styles(len(methods)), strict=True):
            own = [point for point in points if point.method == method]
            fitted = [(point.flops, point.fitted.value) for point in own if point.fitted]
            measured = [(point.flops, point.measured.value) for point in own if point.measured]
            axis.plot([flops for flops, _ in fitted], [value for _, value in fitted], color=style["color"])
            flops, values = [flops for flops, _ in measured], [value for _, value in measured]
            axis.plot(flops, values, linestyle="none", label=method, **style)
        logarithmic(axis.xaxis, power_of_ten)
        label(axis, x="training compute F (FLOPs)", y=f"compute of {baseline}\nfor the same loss / F", title="leverage")
