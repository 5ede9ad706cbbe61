"""The benchmark of scaling: what its predictions must obey."""

from __future__ import annotations

import pytest

from benchmarks.optimizer_scaling.calibrating import Rates, calibrate
from benchmarks.optimizer_scaling.predicting import point, weak
from megatron_hyperp.optim.tensor_parallel import Cost
from megatron_hyperp.planning.step import StepCost

NOTHING = Cost(0.0, 0.0, 0.0, 0)


def test_a_cost_model_finds_the_rates_that_made_the_times() -> None:
    rates = Rates(flop=1e-11, touched=1e-9, sent=2e-9, collective=1e-3)

    def costs(ranks: int, flops: float, touched: float, sent: float, calls: int) -> list[StepCost]:
        exchange = Cost(0.0, sent, 0.0, calls)
        return [StepCost(Cost(flops, 0.0, 0.0, 0), exchange, NOTHING, touched) for _ in range(ranks)]

    alone = [costs(1, 4e10, 1e8, 0.0, 0), costs(1, 1e10, 3e8, 0.0, 0)]
    pairs = [costs(2, 2e10, 5e7, 4e7, 4), costs(2, 5e9, 1e8, 1e7, 12)]
    found = calibrate([(item, rates.step(item, 2)) for item in alone], [(item, rates.step(item, 2)) for item in pairs])
    for name in ("flop", "touched", "sent", "collective"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name))
    # Eight ranks share two cores.
    assert rates.step(costs(8, 1e10, 0.0, 0.0, 0), cores=2) == pytest.approx(4 * 0.1)


def test_work_is_dealt_out_and_never_less_than_all_of_it() -> None:
    points = [point("dense_d8", ranks) for ranks in (1, 8, 64)]
    assert points[0].busiest == points[0].work == points[1].work
    for item in points:
        assert item.busiest * item.ranks >= item.work * (1 - 1e-9)
    assert points[1].efficiency == pytest.approx(points[0].efficiency)
    # A rank of 64 still takes part in a whole matrix's work.
    assert points[2].busiest > points[2].work / 64


def test_weak_scaling_keeps_the_work_of_a_rank() -> None:
    shares = [item.work / item.ranks for item in weak("dense")]
    assert max(shares) < 1.3 * min(shares)
