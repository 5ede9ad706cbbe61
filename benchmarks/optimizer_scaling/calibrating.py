"""Rates of this machine from steps of one and two ranks, and what they say of more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from megatron_hyperp.planning.step import StepCost


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that each unit of work takes.

    Attributes:
        flop: of Newton-Schulz.
        touched: byte of weights, gradients and state that a rank owns.
        sent: byte sent.
        collective: however small.
    """

    flop: float
    touched: float
    sent: float
    collective: float

    def step(self, costs: Sequence[StepCost], cores: int) -> float:
        """Seconds of a step: of the slowest rank, or of all ranks' work on the cores if there are more ranks."""
        each = [
            cost.flops * self.flop
            + cost.touched * self.touched
            + cost.sent * self.sent
            + cost.collectives * self.collective
            for cost in costs
        ]
        return max(*each, sum(each) / cores) if len(each) > 1 else each[0]


def calibrate(
    alone: Sequence[tuple[Sequence[StepCost], float]], pairs: Sequence[tuple[Sequence[StepCost], float]]
) -> Rates:
    """Fit the local rates to steps of one rank, then those of communication to steps of two.

    Least squares of relative errors, no rate below zero.

    Args:
        alone: costs and seconds of steps of one rank.
        pairs: the same of two ranks.
    """
    flop, touched = _fit([(_busiest(costs, "flops"), _busiest(costs, "touched")) for costs, _ in alone], alone)
    local = Rates(flop, touched, 0.0, 0.0)
    left = [(costs, seconds - local.step(costs, len(costs))) for costs, seconds in pairs]
    scales = [seconds for _, seconds in pairs]
    sent, collective = _fit(
        [(_busiest(costs, "sent"), _busiest(costs, "collectives")) for costs, _ in left], left, scales
    )
    return Rates(flop, touched, sent, collective)


def _busiest(costs: Sequence[StepCost], name: str) -> float:
    return float(max(getattr(cost, name) for cost in costs))


def _fit(
    units: Sequence[tuple[float, float]],
    steps: Sequence[tuple[Sequence[StepCost], float]],
    scales: Sequence[float] | None = None,
) -> tuple[float, float]:
    seconds = np.array([value for _, value in steps])
    scale = seconds if scales is None else np.array(scales)
    (first, second), _ = nnls(np.array(units) / scale[:, None], seconds / scale)
    return float(first), float(second)
