"""What ``tools/fit_scaling.py`` prints: aligned tables, and the same as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hyperp import text
from megatron_hyperp.scaling.analysis import (
    GRID_STEP,
    Base,
    LeveragePoint,
    LossFit,
    TokenFit,
    Tuned,
    preset_of,
    recipe_of,
)
from megatron_hyperp.scaling.fit import PowerLaw
from megatron_hyperp.scaling.groups import shown
from megatron_hyperp.transfer import PRESETS, RECIPES, TOKEN_EXPONENT

Result = dict[str, Any]
# What stands where there is no number.
NONE = "-"


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table of rows with the same keys, its columns; what is no number is flush left."""
    numbers = [all(row[name] == NONE or _is_number(row[name]) for row in rows) for name in rows[0]]
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(text.aligned(cells, right=numbers.__getitem__))


def _is_number(cell: str) -> bool:
    try:
        float(cell.split(" ")[0].rstrip("%"))
    except ValueError:
        return False
    return True


def _finite(value: float | None) -> float | None:
    """For JSON, which has no infinity."""
    return value if value is None or math.isfinite(value) else None


def lr_results(tuned: Sequence[Tuned], bases: Mapping[str, Base]) -> list[Result]:
    """The best learning rates, each beside the law of its method's base."""
    results = []
    for entry in tuned:
        base, optimum = bases.get(entry.group.method), entry.optimum
        law = base.law(entry.group) if base else None
        results.append(
            {
                "group": entry.group.key,
                "runs": len(entry.group.runs),
                "lr": optimum.lr if optimum else None,
                "lr_spread": _finite(optimum.spread) if optimum else None,
                "loss": optimum.loss if optimum else None,
                "law": law,
                "ratio": optimum.lr / law if optimum and law else None,
                "refused": entry.refusal or None,
            }
        )
    return results


def lr_table(tuned: Sequence[Tuned], bases: Mapping[str, Base]) -> str:
    """The same to read, with the distance from the law in steps of sqrt 2, and a line on each base."""
    rows = []
    for result in lr_results(tuned, bases):
        row = {name: shown(value) for name, value in result["group"].items()} | {"runs": str(result["runs"])}
        row |= {"best lr": _number(result["lr"]), "error": _number(result["lr_spread"], ".1%")}
        row |= {"loss": _number(result["loss"], ".4f"), "law": _number(result["law"])}
        steps = math.log(result["ratio"]) / GRID_STEP if result["ratio"] else None
        row |= {"lr / law": _number(result["ratio"], ".3f"), "steps": _number(steps, "+.2f")}
        rows.append(row | {"": f"refused: {result['refused']}" if result["refused"] else ""})
    lines = [aligned(rows)]
    return "\n".join([*lines, *(f"law of {method}: {_described(base)}" for method, base in bases.items())])


def _described(base: Base) -> str:
    recipe = recipe_of(base.group)
    if recipe is None:
        return f"none; the methods that have one are {', '.join(RECIPES)} (or name them in a column optimizer)"
    name = preset_of(base.group, base.preset)
    if name not in PRESETS:
        return f"none; the presets of column lr_preset are {', '.join(PRESETS)}"
    factors = [f"{base.optimum.lr:.4g}"]
    if (preset := PRESETS[name]) is not None:
        law = preset.law
        factors += [f"(w/w0)^{law.width:g}", f"(T/T0)^{law.tokens:g}", f"(B/B0)^{law.batch:g}"]
        unknown = "" if base.law(base.group) else "; the file needs a column hidden_size for it"
        return f"{' '.join(factors)} ({name}), from {base.group.name()}{unknown}"
    factors += ["sqrt(d0/d)"] if recipe.depth_law else []
    factors += [f"(T/T0)^-{base.token_exponent:.4g}"] if recipe.token_law else []
    factors += ["sqrt(B/B0)"] if recipe.batch_law else []
    return f"{' '.join(factors)}, from {base.group.name()}"


def token_results(fits: Sequence[TokenFit]) -> list[Result]:
    """The exponents of the tokens."""
    return [
        {
            "model": fit.name,
            "method": fit.method,
            "points": [
                {"tokens": point.group.number("tokens"), "lr": point.optimum.lr if point.optimum else None}
                for point in fit.points
            ],
            "exponent": fit.exponent.value if fit.exponent else None,
            "spread": _finite(fit.exponent.spread) if fit.exponent else None,
            "paper": TOKEN_EXPONENT,
            "refused": fit.refusal or None,
        }
        for fit in fits
    ]


def token_table(fits: Sequence[TokenFit]) -> str:
    """The same to read."""
    rows = []
    for result in token_results(fits):
        lrs = ", ".join(f"{shown(point['tokens'])}: {_number(point['lr'])}" for point in result["points"])
        row = {"model": result["model"], "exponent": _number(result["exponent"], ".3f")}
        row |= {"error": _number(result["spread"], ".3f"), "paper": f"{TOKEN_EXPONENT:g}", "best lr by tokens": lrs}
        rows.append(row | {"": f"refused: {result['refused']}" if result["refused"] else ""})
    return aligned(rows)


def loss_results(fits: Sequence[LossFit]) -> list[Result]:
    """The power laws of loss over compute."""
    return [
        {
            "method": fit.method,
            "points": [{"flops": flops, "loss": loss} for flops, loss in fit.points.items()],
            "at_edge": fit.at_edge,
            **_law(fit.law),
            "refused": fit.refusal or None,
        }
        for fit in fits
    ]


def _law(law: PowerLaw | None) -> Result:
    names = ("A", "b", "C", "spread_log_A", "spread_b", "spread_C")
    return {name: _finite(getattr(law, name)) if law else None for name in names}


def loss_table(fits: Sequence[LossFit]) -> str:
    """The same to read."""
    rows = []
    for fit in fits:
        law = _law(fit.law)
        row = {"method": fit.method, "points": str(len(fit.points)), "A": _number(law["A"])}
        row |= {"b": _number(law["b"], ".4f"), "b error": _number(law["spread_b"], ".4f")}
        row |= {"C": _number(law["C"], ".4f"), "C error": _number(law["spread_C"], ".4f")}
        rows.append(row | {"": f"refused: {fit.refusal}" if fit.refusal else _at_edge(fit)})
    return aligned(rows) + "\nL = A F^-b + C, in nats per token, F in FLOPs"


def _at_edge(fit: LossFit) -> str:
    return f"{fit.at_edge} groups have their best lr at the edge of the grid" if fit.at_edge else ""


def leverage_results(points: Sequence[LeveragePoint]) -> list[Result]:
    """The compute leverage over the baseline."""
    return [
        {
            "method": point.method,
            "flops": point.flops,
            "loss": point.loss,
            "leverage": point.measured.value if point.measured else None,
            "fitted": point.fitted.value if point.fitted else None,
            "baseline_flops": point.measured.baseline_flops if point.measured else None,
            "extrapolation": point.measured.extrapolation if point.measured else None,
            "refused": point.refusal or None,
        }
        for point in points
    ]


def leverage_table(points: Sequence[LeveragePoint], baseline: str) -> str:
    """The same to read."""
    rows = []
    for result in leverage_results(points):
        row = {"method": result["method"], "FLOPs": f"{result['flops']:.4g}", "loss": f"{result['loss']:.4f}"}
        row |= {"leverage": _number(result["leverage"], ".3f"), "of the fit": _number(result["fitted"], ".3f")}
        row |= {f"FLOPs of {baseline}": _number(result["baseline_flops"])}
        row |= {"extrapolated": _number(result["extrapolation"], ".2f")}
        rows.append(row | {"": f"refused: {result['refused']}" if result["refused"] else ""})
    return aligned(rows)


def _number(value: float | None, form: str = ".4g") -> str:
    return NONE if value is None else format(value, form)
