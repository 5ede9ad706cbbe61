"""The tables of a run: where the best learning rate lies along each axis, and how far from where its law puts it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lr_transfer.plan import AXES, Part
from megatron_hyperp.scaling.fit import Optimum, optimal_lr, token_exponent
from megatron_hyperp.transfer import TOKEN_EXPONENT

GRID_STEP = math.sqrt(2)
TITLES = {"width": "width", "depth": "layers", "tokens": "tokens", "K": "K"}


@dataclass(frozen=True, slots=True)
class Found:
    """The best learning rate of a model.

    Attributes:
        part: the model.
        law: the factor that the method's law puts on eta0.
        optimum: of eta0, the learning rate divided by the law; None where the grid does not hold one.
        why: what is wrong with the grid then.
        trainings: number of them.
    """

    part: Part
    law: float
    optimum: Optimum | None
    why: str
    trainings: int


def find(parts: Iterable[Part], table: Path) -> list[Found]:
    """Fit the best learning rate of every part of which the table has trainings."""
    with table.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["loss"]]
    found = []
    for part in parts:
        mine = [row for row in rows if _model(row) == part.model]
        if mine:
            found.append(_fit(part, mine))
    return found


def _model(row: dict[str, str]) -> tuple[str, int, int, int, int]:
    sizes = (int(row[name]) for name in ("hidden_size", "depth", "tokens"))
    return (row["method"], *sizes, int(row.get("moe_topk") or 0))  # type: ignore[return-value]


def _fit(part: Part, rows: Sequence[dict[str, str]]) -> Found:
    rates = [float(row["eta0"]) for row in rows]
    law = float(rows[0]["lr"]) / rates[0]
    try:
        return Found(part, law, optimal_lr(rates, _levelled(rows)), "", len(rows))
    except ValueError as error:
        return Found(part, law, None, str(error), len(rows))


def _levelled(rows: Sequence[dict[str, str]]) -> list[float]:
    """Losses, those of each seed shifted so that its mean over the learning rates that all seeds have is that of all.

    Seeds are searched one by one and need not have the same learning rates; without this, a mean over the seeds that
    have one would jump from one learning rate to the next.
    """
    losses = {(row.get("seed", ""), row["eta0"]): float(row["loss"]) for row in rows}
    seeds, rates = ({key[index] for key in losses} for index in (0, 1))
    shared = [rate for rate in rates if all(math.isfinite(losses.get((seed, rate), math.inf)) for seed in seeds)]
    if not shared:
        raise ValueError("the seeds have no learning rate in common; give the search another start")
    level = {seed: sum(losses[seed, rate] for rate in shared) / len(shared) for seed in seeds}
    common = sum(level.values()) / len(level)
    return [losses[key] - level[key[0]] + common for key in ((row.get("seed", ""), row["eta0"]) for row in rows)]


def steps(rate: float, base: float) -> float:
    """How many steps of the grid, factors of sqrt(2), a learning rate lies above another."""
    return math.log(rate / base) / math.log(GRID_STEP)


def report(found: Sequence[Found]) -> str:
    """Return Markdown tables, one for each method, and a summary of all."""
    methods = list(dict.fromkeys(entry.part.method for entry in found))
    texts = [_method(method, [entry for entry in found if entry.part.method == method]) for method in methods]
    return "\n\n".join([*texts, _summary(methods, found)])


def _method(method: str, found: Sequence[Found]) -> str:
    """Every model's best learning rate."""
    lines = [
        f"### {method}",
        "",
        "| axis | value | best lr | law | best lr / law | standard error, steps | steps from the base | least loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in sorted(found, key=lambda entry: (AXES.index(entry.part.axis), entry.part.value)):
        part, optimum = entry.part, entry.optimum
        cells = [TITLES[part.axis], f"{part.value:,}"]
        if optimum is None:
            cells += ["-", f"{entry.law:.3f}", entry.why, "-", "-", "-"]
        else:
            spread = "-" if optimum.spread is None else f"{optimum.spread / math.log(GRID_STEP):.2f}"
            distance = _distance(entry, found)
            cells += [f"{optimum.lr * entry.law:.4g}", f"{entry.law:.3f}", f"{optimum.lr:.4g}", spread]
            cells += ["-" if distance is None else f"{distance:+.2f}", f"{optimum.loss:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _distance(entry: Found, found: Sequence[Found]) -> float | None:
    """Grid steps between a model's best learning rate over its law and the base's: the first of its axis."""
    base = next(other for other in found if other.part.axis == entry.part.axis)
    if entry.optimum is None or base.optimum is None:
        return None
    return steps(entry.optimum.lr, base.optimum.lr)


def _summary(methods: Sequence[str], found: Sequence[Found]) -> str:
    """How far the optima of each axis lie apart once the law is divided out, and the tokens' exponent."""
    lines = [
        "### Grid steps (factors of sqrt 2) between the least and the largest best lr / law",
        "",
        f"| method | {' | '.join(f'{TITLES[axis]}' for axis in AXES)} | exponent of the tokens |",
        f"|---|{'---:|' * (len(AXES) + 1)}",
    ]
    for method in methods:
        cells = [method]
        for axis in AXES:
            mine = [entry for entry in found if entry.part.method == method and entry.part.axis == axis]
            rates = [entry.optimum.lr for entry in mine if entry.optimum]
            missing = "" if len(rates) == len(mine) else f" ({len(rates)} of {len(mine)})"
            cells.append(f"{steps(max(rates), min(rates)):.2f}{missing}" if len(rates) > 1 else "-")
        lines.append(f"| {' | '.join([*cells, _exponent(method, found)])} |")
    return "\n".join(
        [*lines, "", f"The exponent of best lr ~ T^-x with its standard error; the law's is {TOKEN_EXPONENT}."]
    )


def _exponent(method: str, found: Sequence[Found]) -> str:
    mine = [entry for entry in found if entry.part.method == method and entry.part.axis == "tokens" and entry.optimum]
    try:
        tokens = [float(entry.part.tokens) for entry in mine]
        exponent = token_exponent(tokens, [entry.optimum.lr * entry.law for entry in mine if entry.optimum])
    except ValueError:
        return "-"
    return f"{round(exponent.value, 2) + 0.0:.2f}" + ("" if exponent.spread is None else f" +- {exponent.spread:.2f}")
