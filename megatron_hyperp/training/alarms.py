"""Alarms: thresholds on metrics that warn, save a checkpoint or stop the run."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hyperp.errors import UsageError

ACTIONS = ("warn", "save", "stop")
TRAINING_METRICS = (
    "loss",
    "eval_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "radius_drift",
    "idle_matrices",
    "skipped",
    "mfu",
)
STABILITY_METRICS = (
    "attention_z",
    "router_z",
    "output_z",
    "attention_rms",
    "mlp_rms",
    "attention_outliers",
    "mlp_outliers",
    "max_vio",
    "balance_loss",
    *(f"angle_{group}" for group in ("attention", "mlp", "experts", "router")),
    *(f"grad_norm_{group}" for group in ("embedding", "output", "attention", "mlp", "experts", "router", "vectors")),
)
METRICS = TRAINING_METRICS + STABILITY_METRICS
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*([^\s*:]+)\s*(\*\s*smoothed)?\s*(?::\s*(\w+))?\s*")
# Of a value in the smoothed one.
WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Alarm:
    """One threshold.

    Attributes:
        text: as given.
        metric: one of :data:`METRICS`.
        compare: when to sound.
        threshold: a number, or a factor on the smoothed metric.
        relative: whether it is a factor.
        action: one of :data:`ACTIONS`.
    """

    text: str
    metric: str
    compare: Callable[[float, float], bool]
    threshold: float
    relative: bool
    action: str


def parse_alarm(text: str) -> Alarm:
    """Read ``METRIC > NUMBER [* smoothed] [: ACTION]``; the comparison may be >, >=, < or <=.

    Raises:
        UsageError: it is none, or the metric or action is unknown.
    """
    match = _FORM.fullmatch(text.strip())
    form = 'give "METRIC > NUMBER", "METRIC > NUMBER * smoothed", either with ": save" or ": stop" behind it'
    if match is None:
        raise UsageError(f"--alarm {text!r} cannot be read; {form}")
    metric, comparison, number, relative, action = match.groups()
    if metric not in METRICS:
        raise UsageError(f"--alarm {text!r}: there is no metric {metric}; there are {', '.join(METRICS)}")
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise UsageError(f"--alarm {text!r}: {number} is no finite number; {form}")
    if action is not None and action not in ACTIONS:
        raise UsageError(f"--alarm {text!r}: there is no action {action}; there are {', '.join(ACTIONS)}")
    return Alarm(text, metric, _COMPARE[comparison], threshold, bool(relative), action or "warn")


def check(texts: Iterable[str], *, saves: bool) -> None:
    """See that alarms can do what they are to.

    Args:
        texts: see :func:`parse_alarm`.
        saves: whether the run keeps checkpoints.

    Raises:
        UsageError: one cannot be read, or is to save a checkpoint where none is kept.
    """
    for alarm in map(parse_alarm, texts):
        if alarm.action == "save" and not saves:
            raise UsageError(f"--alarm {alarm.text!r} needs --save for its checkpoint; give it, or another action")


class Alarms:
    """Looks at rows of metrics.

    Args:
        texts: see :func:`parse_alarm`.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._alarms = [parse_alarm(text) for text in texts]
        self._smoothed: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._alarms)

    def check(self, row: Mapping[str, Any]) -> list[tuple[Alarm, str]]:
        """Return the alarms that a row sets off, each with a line that says why; what is not finite sets off all."""
        sounding = []
        for alarm in self._alarms:
            value = row.get(alarm.metric)
            if value is None:
                continue
            limit = alarm.threshold
            if alarm.relative:
                if alarm.metric not in self._smoothed:
                    continue
                limit *= self._smoothed[alarm.metric]
            if not math.isfinite(value) or alarm.compare(value, limit):
                sounding.append((alarm, f"alarm: {alarm.metric} is {value:.6g} ({alarm.text})"))
        for metric in {alarm.metric for alarm in self._alarms}:
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                before = self._smoothed.get(metric, value)
                self._smoothed[metric] = before + WEIGHT * (value - before)
        return sounding
