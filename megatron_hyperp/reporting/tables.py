"""Tables of a report, as HTML; whatever comes from a file is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from statistics import median
from typing import Any

from megatron_hyperp.reporting.drawing import amount, colours
from megatron_hyperp.reporting.heatmaps import INDICATORS, indicators
from megatron_hyperp.reporting.runs import PER_LAYER, Row, Run, number
from megatron_hyperp.training.logging import duration

ABSENT = "–"
MOST_EVENTS = 500
DIFFERS = " class='differs'"
TOP_OPERATIONS = 15
# An alarm's message ends in its rule, in parentheses.
_RULE = re.compile(r"\(([^()]*)\)\s*$")


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def cell(value: Any) -> str:
    """Escape a value unless it is :class:`Html`."""
    return value if isinstance(value, Html) else escape(str(value))


def table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], *, numbers: bool = True, marked: Sequence[bool] = ()
) -> Html:
    """Return a table in a box that scrolls by itself; the first column names the row.

    Args:
        head: of the columns.
        rows: of cells.
        numbers: align what follows the first column to the right.
        marked: rows to highlight.
    """
    marks = [*marked, *[False] * (len(rows) - len(marked))]
    body = "".join(
        f"<tr{DIFFERS if mark else ''}><th scope='row'>{cell(row[0])}</th>"
        + "".join(f"<td>{cell(value)}</td>" for value in row[1:])
        + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    columns = "".join(f"<th scope='col'>{cell(value)}</th>" for value in head)
    kind = "numbers" if numbers else "texts"
    return Html(
        f"<div class='scroll' tabindex='0'><table class='{kind}'><thead><tr>{columns}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def chip(name: str, colour: str) -> Html:
    """A run's name behind a spot of its colour."""
    return Html(f"<span class='chip' style='background:{colour}'></span>{escape(name)}")


def chips(runs: Sequence[Run]) -> list[Html]:
    """A chip for each run."""
    return [chip(run.name, colour) for run, colour in zip(runs, colours(len(runs)), strict=True)]


def _number(value: float | None, form: str = ".4f") -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


def _largest(run: Run, key: str, form: str = ".1f") -> str:
    """The largest value of an indicator, over layers where it is told by layer."""
    layers = [number(value) for row in run.stability for value in row.get(key + PER_LAYER) or []]
    values = [value for value in layers if math.isfinite(value)] or run.values(key)
    return _number(max(values, default=None), form)


def summary(runs: Sequence[Run]) -> Html:
    """One row for each run: size, budget, losses, largest indicators, speed."""
    head = [
        *("run", "optimizer", "layers × width", "parameters (active)", "tokens", "FLOPs"),
        *("best held-out loss", "test loss", "last training loss", "largest drift"),
        *("largest Z: attention", "largest Z: router", "largest Z: output", "largest MaxVio"),
        *("tokens/s", "MFU", "training time", "alarms"),
    ]
    return table(head, [_summary(run, name) for run, name in zip(runs, chips(runs), strict=True)])


def _summary(run: Run, name: Html) -> list[Any]:
    held_out, size = run.values("eval_loss"), run.size
    losses, paces, utilizations = run.series("loss")[1], run.values("tokens_per_s"), run.values("mfu")
    parameters = ABSENT if size is None else amount(size.parameters)
    if size is not None and size.active != size.parameters:
        parameters += f" ({amount(size.active)})"
    return [
        name,
        (run.settings or {}).get("optimizer.optimizer", ABSENT),
        ABSENT if size is None else f"{size.layers} × {size.width}",
        parameters,
        amount(run.tokens),
        ABSENT if size is None else f"{size.flops_per_token * run.tokens:.2e}",
        _number(min(held_out, default=None)),
        _number(next(reversed(run.values("test_loss")), None)),
        _number(losses[-1] if losses else None),
        _number(max(run.values("radius_drift"), default=None), ".1e"),
        _largest(run, "attention_z"),
        _largest(run, "router_z"),
        _largest(run, "output_z"),
        _largest(run, "max_vio", ".2f"),
        f"{median(paces):,.0f}" if paces else ABSENT,
        f"{100 * median(utilizations):.1f}%" if utilizations else ABSENT,
        duration(run.seconds) if run.seconds else ABSENT,
        sum(event.get("kind") == "alarm" for event in run.events),
    ]


def indicators_at_end(runs: Sequence[Run]) -> Html:
    """The last value of each indicator of the model, and in parentheses its largest."""
    rows = []
    for key in indicators(runs):
        row: list[Any] = [INDICATORS.get(key, (key, ""))[0]]
        for run in runs:
            values = [value for value in run.series(key)[1] if math.isfinite(value)]
            row.append(f"{values[-1]:.3g} ({max(values):.3g})" if values else ABSENT)
        rows.append(row)
    return table(["last (largest)", *chips(runs)], rows)


def alarms(runs: Sequence[Run]) -> Html | None:
    """Alarms of one rule and run as one row; None if none sounded."""
    rows = []
    for run, name in zip(runs, chips(runs), strict=True):
        rules: dict[str, list[Row]] = {}
        for event in run.events:
            if event.get("kind") == "alarm":
                message = str(event.get("message", ""))
                match = _RULE.search(message)
                rules.setdefault(match[1] if match else message, []).append(event)
        for rule, events in rules.items():
            first, last = events[0], events[-1]
            counts = [len(events), first.get("iteration", ABSENT), last.get("iteration", ABSENT)]
            said = str(last.get("message", "")).removeprefix("alarm: ").removesuffix(f" ({rule})")
            rows.append([name, rule, *counts, said])
    return table(["run", "alarm", "times", "first iteration", "last", "at last"], rows, numbers=False) if rows else None


def events(runs: Sequence[Run]) -> Html | None:
    """Every event in order of time, the last of very many; None without any."""
    rows: list[tuple[float, list[Any]]] = []
    for run, name in zip(runs, chips(runs), strict=True):
        for event in run.events:
            at = number(event.get("time"), 0.0)
            words = [name, event.get("iteration", ABSENT), event.get("kind", ABSENT), event.get("message", "")]
            rows.append((at, [_moment(at), *words]))
    if not rows:
        return None
    rows.sort(key=lambda entry: entry[0])
    head = ["time (UTC)", "run", "iteration", "kind", "what"]
    shown = table(head, [row for _, row in rows[-MOST_EVENTS:]], numbers=False)
    left_out = len(rows) - MOST_EVENTS
    return Html((f"<p>The last {MOST_EVENTS} of {len(rows)}.</p>" if left_out > 0 else "") + shown)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else ABSENT
    except (ValueError, OverflowError, OSError):
        return ABSENT


def settings(runs: Sequence[Run]) -> tuple[Html | None, Html | None, int]:
    """The resolved configuration.

    Returns:
        A table of the settings in which runs differ, one of all settings with these marked and first, and how many
        differ; None where there is nothing to show.
    """
    known = [(run.settings, name) for run, name in zip(runs, chips(runs), strict=True) if run.settings is not None]
    keys = list(dict.fromkeys(key for given, _ in known for key in given))
    if not keys:
        return None, None, 0
    rows = {key: [_breakable(key), *(_setting(given, key) for given, _ in known)] for key in keys}
    differ = {key: len({repr(given.get(key, KeyError)) for given, _ in known}) > 1 for key in keys}
    differing = [row for key, row in rows.items() if differ[key]]
    alike = [row for key, row in rows.items() if not differ[key]]
    head = ["setting", *(name for _, name in known)]
    marks = [True] * len(differing)
    part = table(head, differing, numbers=False, marked=marks) if differing else None
    return part, table(head, [*differing, *alike], numbers=False, marked=marks), len(differing)


def _breakable(key: str) -> Html:
    """A setting's name that may go on in the next line behind a dot or an underscore."""
    return Html(re.sub(r"([._])", r"\1<wbr>", escape(key)))


def _setting(given: dict[str, Any], key: str) -> str:
    if key not in given:
        return "(not there)"
    value = given[key]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "[]"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def operations(rows: Sequence[Row]) -> Html:
    """The operations of a profile that took most time by themselves."""
    total = sum(number(row.get("self_ms"), 0.0) for row in rows) or 1.0
    body = []
    for row in rows[:TOP_OPERATIONS]:
        own = number(row.get("self_ms"), 0.0)
        bar = Html(f"<span class='bar' style='width:{100 * own / total:.1f}%'></span>")
        body.append([row.get("operation", ABSENT), row.get("calls", ABSENT), f"{own:,.1f}", f"{own / total:.0%}", bar])
    return table(["operation", "calls", "ms by itself", "of those listed", ""], body)
