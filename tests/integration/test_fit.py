"""Fits recover what synthetic losses were made of, with honest errors, and refuse points that determine nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_hyperp.scaling.fit import leverage, optimal_lr, power_law, token_exponent
from megatron_hyperp.scaling.numerics import mean_losses

# What the issue asks of synthetic data without noise.
WITHIN = 0.01
NOISE = 1e-3
# Standard errors from a few points over are rough: of noisy fits, this share must lie within two of them.
SHARE = 0.85
FLOPS = np.geomspace(2e19, 6e21, 8)
INF = math.inf


def grid(factor: float, points: int = 7, middle: float = 0.06) -> list[float]:
    return [middle * factor ** (index - points // 2) for index in range(points)]


def bowl(lrs: list[float], best: float, curvature: float = 0.15) -> list[float]:
    return [3.0 + curvature * math.log(lr / best) ** 2 for lr in lrs]


def curve(b: float, c: float) -> list[float]:
    return [float((3.2 - c) * (flops / 2e19) ** -b + c) for flops in FLOPS]


# The best learning rate


@pytest.mark.parametrize("factor", [2**0.25, math.sqrt(2), 2.0, 4.0])
@pytest.mark.parametrize("best", [0.05, 0.06, 0.0701])
def test_optimum_is_recovered(factor: float, best: float) -> None:
    lrs = grid(factor)
    found = optimal_lr(lrs, bowl(lrs, best))
    assert found.lr == pytest.approx(best, rel=WITHIN)
    assert (found.loss, found.curvature) == pytest.approx((3.0, 0.15), rel=WITHIN)
    assert found.loss_at(2 * best) == pytest.approx(bowl([2 * best], best)[0], rel=WITHIN)
    # On a grid of sqrt 2 two points on each side; on a coarse one the neighbours, which leave nothing for an error.
    assert (found.spread is None) == (factor >= 2)


def test_three_points_are_fitted_exactly_in_any_order() -> None:
    lrs = [0.06, 0.03, 0.12]
    found = optimal_lr(lrs, bowl(lrs, 0.05))
    assert found.lr == pytest.approx(0.05, rel=1e-9)
    assert found.spread is None


def test_rounded_grid_and_a_lopsided_one() -> None:
    lrs = [0.015, 0.0212, 0.03, 0.0424, 0.06, 0.085]
    assert optimal_lr(lrs, bowl(lrs, 0.03)).window == (0.015, 0.0212, 0.03, 0.0424, 0.06)
    # One point on the left: two on the right would pull the minimum there.
    assert optimal_lr(lrs, bowl(lrs, 0.021)).window == (0.015, 0.0212, 0.03)


def test_error_of_the_optimum_is_honest() -> None:
    random, lrs, pulls = np.random.default_rng(0), grid(math.sqrt(2)), []
    for _ in range(40):
        losses = bowl(lrs, 0.0553) * np.exp(NOISE * random.standard_normal(len(lrs)))
        found = optimal_lr(lrs, losses.tolist())
        assert found.spread is not None
        assert found.spread < 0.1
        pulls.append(abs(math.log(found.lr / 0.0553)) / found.spread)
    assert np.mean(np.array(pulls) < 2) >= SHARE


def test_a_diverged_run_bounds_the_minimum_and_is_not_fitted() -> None:
    lrs = grid(math.sqrt(2), 4)
    losses = bowl(lrs[:3], 0.0553)
    assert optimal_lr(lrs, [*losses, INF]) == optimal_lr(lrs, [*losses, math.nan])
    assert optimal_lr(lrs, [*losses, INF]).lr == pytest.approx(0.0553, rel=WITHIN)
    # One diverged seed makes its learning rate as bad.
    assert optimal_lr([*lrs, lrs[3]], [*losses, 2.0, INF]) == optimal_lr(lrs, [*losses, INF])


def test_seeds_are_averaged_also_where_some_are_missing() -> None:
    lrs = grid(math.sqrt(2), 5)
    losses = bowl(lrs, 0.055)
    high = [loss + 0.1 for loss in losses]
    both = mean_losses(lrs + lrs, losses + high, [1] * 5 + [2] * 5)
    assert list(both.values()) == pytest.approx([loss + 0.05 for loss in losses])
    # The second seed, whose losses are all higher, was not trained at the edges.
    found = optimal_lr(lrs + lrs[1:4], losses + high[1:4], [1] * 5 + [2] * 3)
    assert found.lr == pytest.approx(0.055, rel=1e-6)


@pytest.mark.parametrize(
    ("lrs", "losses", "message"),
    [
        ([0.1, 0.2], [1.0, 2.0], r"takes 3 learning rates with a finite loss, and there are 2; add"),
        ([0.1, 0.2, 0.4], [2.0, 1.0, INF], "there are 2; add"),
        ([], [], "there are 0; add"),
        ([0.1, 0.2, 0.4], [1.0, 2.0, 3.0], r"lowest loss, 1\.0000, is at lr 0\.1, the edge of the grid; add smaller"),
        ([0.1, 0.2, 0.4], [3.0, 2.0, 1.0], r"is at lr 0\.4, the edge of the grid; add larger"),
        ([0.1, 0.2, 0.4, 0.8], [INF, 1.0, 2.0, 3.0], r"is at lr 0\.2, the edge of the grid; add smaller"),
        ([0.1, 0.2, 0.4], [2.0, 2.0, 2.0], r"the edge of the grid"),
        ([0.05, 0.1, 0.2, 0.4], [4.0, 3.0, 2.0, INF], r"\(4\.0000, 3\.0000, 2\.0000, .*flat or not convex; add seeds"),
        ([0.05, 0.1, 0.2, 0.4], [2.31, 2.15, 2.0, INF], r"minimum at lr .*, not between the neighbours 0\.1 and 0\.4"),
        ([0.1, 0.2, -0.4], [2.0, 1.0, 2.0], r"a learning rate is -0\.4; it must be a number above 0"),
    ],
)
def test_optima_that_are_refused(lrs: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal_lr(lrs, losses)


# The exponent of the tokens


@pytest.mark.parametrize("exponent", [0.32, 0.0, -0.1, 0.55])
def test_exponent_is_recovered(exponent: float) -> None:
    tokens = [2.5e5, 1e6, 4e6]
    found = token_exponent(tokens, [0.055 * (t / 1e6) ** -exponent for t in tokens])
    assert found.value == pytest.approx(exponent, abs=1e-9)
    assert found.spread == pytest.approx(0.0, abs=1e-9)
    assert found.lr_at(1e6) == pytest.approx(0.055)


def test_exponent_has_an_error_from_three_points_on() -> None:
    assert token_exponent([1e6, 4e6], [0.06, 0.03]).value == pytest.approx(0.5)
    assert token_exponent([1e6, 4e6], [0.06, 0.03]).spread is None
    scattered = token_exponent([1e6, 2e6, 4e6, 8e6], [0.06, 0.052, 0.037, 0.032])
    assert scattered.spread is not None
    assert abs(scattered.value - 0.32) < 2 * scattered.spread


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1e6], "and there are 1; add"), ([1e6, 1e6], "and there are 1"), ([1e6, -1.0], r"tokens is -1\.0; it must")],
)
def test_exponents_that_are_refused(tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_exponent(tokens, [0.06] * len(tokens))


# Loss over compute


@pytest.mark.parametrize("points", [slice(0, 4), slice(None)])
@pytest.mark.parametrize(("b", "c"), [(0.05, 1.7), (0.15, 2.0), (0.6, 2.5), (0.1, 0.0)])
def test_power_law_is_recovered(b: float, c: float, points: slice) -> None:
    found = power_law(FLOPS[points].tolist(), curve(b, c)[points])
    coefficient = (3.2 - c) * 2e19**b
    assert (found.A, found.b) == pytest.approx((coefficient, b), rel=WITHIN)
    assert abs(found.C - c) < WITHIN * max(c, 1e-3)
    assert max(found.spread_log_A, found.spread_b, found.spread_C) < 1e-4
    assert found.loss(1e21) == pytest.approx((3.2 - c) * (1e21 / 2e19) ** -b + c)
    assert found.flops_for(found.loss(1e21)) == pytest.approx(1e21)


def test_error_of_the_power_law_is_honest() -> None:
    random, pulls = np.random.default_rng(0), []
    for _ in range(10):
        losses = curve(0.15, 2.0) * np.exp(NOISE * random.standard_normal(len(FLOPS)))
        found = power_law(FLOPS.tolist(), losses.tolist())
        pulls += [abs(found.b - 0.15) / found.spread_b, abs(found.C - 2.0) / found.spread_C]
        assert found.spread_b < 0.1
    assert np.mean(np.array(pulls) < 2) >= SHARE


def test_one_bad_run_bends_the_law_little() -> None:
    losses = curve(0.15, 2.0)
    losses[3] *= 1.05
    assert power_law(FLOPS.tolist(), losses).b == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize(
    ("flops", "losses", "message"),
    [
        ([1e18, 2e18, 4e18], [3.0, 2.9, 2.8], "takes 4 points of different FLOPs, and there are 3; add"),
        ([1e18, 1e18, 2e18, 4e18], [3.0, 3.0, 2.9, 2.8], "and there are 3; add"),
        ([1e18, 2e18, 4e18, 8e18], [3.0, 3.0, 3.0, 3.0], r"3\.0000, 3\.0000, .*determine no exponent; they must fall"),
        ([1e18, 2e18, 4e18, 8e18], [3.0, 3.1, 3.2, 3.3], "determine no exponent"),
        ([1e18, 2e18, 4e18, 8e18], [3.0, 2.0, 2.0, 2.0], "determine no exponent"),
        ([1e18, 2e18, 4e18, 8e18], [3.0, 2.9, 2.8, INF], "a loss is inf; it must be a number above 0"),
        ([0.0, 2e18, 4e18, 8e18], [3.0, 2.9, 2.8, 2.7], r"a number of FLOPs is 0\.0; it must"),
    ],
)
def test_power_laws_that_are_refused(flops: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        power_law(flops, losses)


# Leverage


def test_leverage_over_itself_is_one_and_a_faster_method_has_its_factor() -> None:
    baseline = power_law(FLOPS.tolist(), curve(0.15, 2.0))
    for flops in FLOPS:
        loss = baseline.loss(flops)
        assert leverage(baseline, flops, loss).value == pytest.approx(1.0, abs=1e-9)
        assert leverage(baseline, flops / 1.58, loss).value == pytest.approx(1.58)
        assert leverage(baseline, flops, loss).extrapolation == pytest.approx(1.0)
    beyond = leverage(baseline, FLOPS[-1], baseline.loss(3 * FLOPS[-1]))
    assert (beyond.value, beyond.extrapolation) == pytest.approx((3.0, 3.0))
    below = leverage(baseline, FLOPS[0], baseline.loss(FLOPS[0] / 2))
    assert (below.value, below.extrapolation) == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (1.99999, r"the loss 2\.0000 is not above the baseline's irreducible loss C = 2\.0000"),
        (1.0, "never reaches it; measure the baseline at more FLOPs"),
        (2.001, r"times outside its points \(2e\+19 to 6e\+21 FLOPs; 10 times are allowed\); measure it there"),
        (9.0, "times outside its points"),
    ],
)
def test_leverage_that_is_refused(loss: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leverage(power_law(FLOPS.tolist(), curve(0.15, 2.0)), 1e21, loss)
