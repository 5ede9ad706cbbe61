"""Laws fitted to measured losses: the best learning rate, its fall with the tokens, loss over compute, and leverage.

Every function is pure and raises ``ValueError``, in one line, where the points do not determine what is asked for.
Spreads are standard errors by the jackknife: each point is left out in turn (Efron and Stein, Ann. Statist. 9, 1981).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hyperp.scaling.numerics import (
    Array,
    Flags,
    Indices,
    at_bound,
    distinct,
    jackknife,
    listed,
    mean_losses,
    parabola,
    power_law_parameters,
)

# The parabola is fitted to points within this factor of the best learning rate (two on each side of a grid of sqrt 2,
# with room for rounded values), and to its two neighbours in any case. Loss curves are not symmetric, which shifts the
# vertex the further, the wider the window; and a window with more points on one side pulls it there.
WINDOW = 2.1
# A law whose loss falls by less than this share over its points is none.
LEAST_FALL = 1e-6
# How far outside the fitted FLOPs a law is believed.
MAX_EXTRAPOLATION = 10.0


@dataclass(frozen=True, slots=True)
class Optimum:
    """The minimum of a parabola in log lr.

    Attributes:
        lr: the best learning rate.
        loss: the parabola's loss there.
        spread: standard error of ln lr, a rough one with the usual five points; None with three, which leave nothing.
        curvature: c of loss(lr') = loss + c ln(lr'/lr)^2.
        window: the learning rates of the fit, ascending.
        best_measured: the learning rate of the lowest measured loss.
    """

    lr: float
    loss: float
    spread: float | None
    curvature: float
    window: tuple[float, ...]
    best_measured: float

    def loss_at(self, lr: float) -> float:
        """The parabola's loss at a learning rate."""
        return self.loss + self.curvature * math.log(lr / self.lr) ** 2


@dataclass(frozen=True, slots=True)
class Exponent:
    """A power law of the best learning rate, eta*(T) = lr (T / tokens)^-value.

    Attributes:
        value: the exponent, without its sign.
        spread: its standard error; None with two points.
        tokens: geometric mean of the measured tokens.
        lr: the fitted learning rate there.
    """

    value: float
    spread: float | None
    tokens: float
    lr: float

    def lr_at(self, tokens: float) -> float:
        """The fitted learning rate for a number of tokens."""
        return self.lr * (tokens / self.tokens) ** -self.value


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Loss over compute, L(F) = A F^-b + C.

    Attributes:
        A: the coefficient, in nats per token x FLOPs^b.
        b: the exponent.
        C: the irreducible loss, in nats per token.
        spread_log_A: standard error of ln A.
        spread_b: standard error of b.
        spread_C: standard error of C.
        flops: least and largest FLOPs of the points.
    """

    A: float
    b: float
    C: float
    spread_log_A: float
    spread_b: float
    spread_C: float
    flops: tuple[float, float]

    def loss(self, flops: float) -> float:
        """The loss after so many FLOPs."""
        return self.A * flops**-self.b + self.C

    def flops_for(self, loss: float) -> float:
        """The FLOPs that reach a loss above C; infinite beyond the range of floats."""
        with np.errstate(over="ignore"):
            return float(np.exp((math.log(self.A) - math.log(loss - self.C)) / self.b))


@dataclass(frozen=True, slots=True)
class Leverage:
    """Compute that a method saves.

    Attributes:
        value: FLOPs that the baseline needs for the loss, over those used.
        baseline_flops: FLOPs that the baseline needs.
        extrapolation: how far they lie outside the baseline's points, as a factor; 1 within them.
    """

    value: float
    baseline_flops: float
    extrapolation: float


def optimal_lr(lrs: Sequence[float], losses: Sequence[float], seeds: Sequence[Hashable] | None = None) -> Optimum:
    """Fit the best learning rate of one model by a parabola in log lr about the lowest loss.

    Losses of several seeds at one lr are averaged, see :func:`megatron_hyperp.scaling.numerics.mean_losses`. Points
    beyond the neighbours of the best one count half: they steady the fit against noise, and the curve's asymmetry
    enters with the cube of their distance.

    Args:
        lrs: learning rates, any order, repeated for seeds.
        losses: losses in nats per token; one that is not finite (a diverged run) is worse than any other: it may bound
            the minimum on the right, and is not fitted.
        seeds: of each training; None: one seed, or as if.

    Raises:
        ValueError: fewer than three finite points, the minimum at an edge of the grid, or no minimum.
    """
    by_lr = mean_losses(list(_positive("learning rate", lrs)), losses, seeds)
    grid, means = np.array(list(by_lr)), np.array(list(by_lr.values()))
    finite = np.isfinite(means)
    if finite.sum() < 3:
        raise ValueError(
            f"a parabola takes 3 learning rates with a finite loss, and there are {finite.sum()}; add some, a factor"
            " of sqrt 2 apart"
        )
    best, left, right = _bracket(grid, means, finite)
    u = np.log(grid / best)
    chosen = _window(u, finite)
    weights = np.where((grid < left) | (grid > right), 0.5, 1.0)
    u, y, weights = u[chosen], means[chosen], weights[chosen]
    shift, loss, curvature = parabola(u, y, weights)
    lr = best * math.exp(shift)
    if not left < lr < right:
        raise ValueError(
            f"the parabola has its minimum at lr {lr:.4g}, not between the neighbours {left:.4g} and {right:.4g} of the"
            f" best one, {best:.4g}; add seeds, or learning rates near it"
        )
    spread = None
    if len(chosen) > 3:
        spread = float(jackknife(len(chosen), lambda rest: parabola(u[rest], y[rest], weights[rest])[0]))
    return Optimum(lr, loss, spread, curvature, tuple(grid[chosen].tolist()), best)


def _bracket(grid: Array, means: Array, finite: Flags) -> tuple[float, float, float]:
    """Return the learning rate of the lowest loss, its left neighbour with a finite loss, and its right neighbour."""
    best = int(np.argmin(means))
    left, right = grid[:best][finite[:best]], grid[best + 1 :]
    for neighbours, wanted in ((left, "smaller"), (right, "larger")):
        if not len(neighbours):
            raise ValueError(
                f"the lowest loss, {means[best]:.4f}, is at lr {grid[best]:.4g}, the edge of the grid; add {wanted}"
                " learning rates"
            )
    return float(grid[best]), float(left[-1]), float(right[0])


def _window(u: Array, finite: Flags) -> Indices:
    """Indices of the points to fit, as many on each side of the best one (u = 0): see :data:`WINDOW`.

    Where a side has none with a finite loss, these are the three nearest points.
    """
    measured = np.flatnonzero(finite)
    best = int(np.flatnonzero(u[measured] == 0)[0])
    near = np.abs(u[measured]) <= math.log(WINDOW)
    sides = min(int(near[:best].sum()), int(near[best + 1 :].sum()))
    sides = max(sides, min(best, len(measured) - 1 - best, 1))
    if sides:
        return measured[best - sides : best + sides + 1]
    return np.sort(measured[np.argsort(np.abs(u[measured]), kind="stable")[:3]])


def token_exponent(tokens: Sequence[float], lrs: Sequence[float]) -> Exponent:
    """Fit eta*(T) ~ T^-x to the best learning rates of one model, by least squares in logs.

    Args:
        tokens: training tokens T.
        lrs: the best learning rate of each.

    Raises:
        ValueError: fewer than two different numbers of tokens.
    """
    x, y = np.log(_positive("number of tokens", tokens)), np.log(_positive("learning rate", lrs))
    if distinct(x) < 2:
        raise ValueError(f"an exponent takes 2 different numbers of tokens, and there are {distinct(x)}; add some")

    def slope(points: Indices) -> float:
        if distinct(x[points]) < 2:
            raise ValueError("one number of tokens has no slope")
        return float(np.polyfit(x[points], y[points], 1)[0])

    spread = float(jackknife(len(x), slope)) if distinct(x) > 2 else None
    return Exponent(-slope(np.arange(len(x))), spread, math.exp(x.mean()), math.exp(y.mean()))


def _positive(name: str, values: Sequence[float]) -> Array:
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a {name} is {value}; it must be a number above 0")
    return np.array(values, dtype=np.float64)


def power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit L(F) = A F^-b + C, with b > 0 and C >= 0.

    The sum of Huber losses of the residuals in log loss is minimized from several starts, as in Chinchilla's third
    approach (arXiv 2203.15556, D.2; the sum, for a mean ends the search too early, arXiv 2404.10102): one bad run does
    not bend the law, and with little noise it is least squares.

    Args:
        flops: training FLOPs F.
        losses: the best loss of each, in nats per token.

    Raises:
        ValueError: fewer than four different FLOPs, or points that determine no exponent.
    """
    x, y = _positive("number of FLOPs", flops), _positive("loss", losses)
    if distinct(x) < 4:
        raise ValueError(
            f"L = A F^-b + C takes 4 points of different FLOPs, and there are {distinct(x)}; add model sizes or tokens"
        )
    middle = math.exp(np.log(x).mean())

    def parameters(points: Indices) -> Array:
        """The law's (ln A, b, C), fitted to F over the middle."""
        log_a, b, c = power_law_parameters(x[points] / middle, y[points])
        return np.array([log_a + b * math.log(middle), b, c])

    log_a, b, c = parameters(np.arange(len(x))).tolist()
    fall = math.exp(log_a) * (float(x.min()) ** -b - float(x.max()) ** -b)
    if at_bound(b) or fall < LEAST_FALL * float(y.min()):
        raise ValueError(
            f"the losses {listed(y[np.argsort(x)])}, by increasing FLOPs, determine no exponent; they must fall, and"
            " ever more slowly"
        )
    spread_log_a, spread_b, spread_c = jackknife(len(x), parameters).tolist()
    measured = (float(x.min()), float(x.max()))
    return PowerLaw(math.exp(log_a), b, c, spread_log_a, spread_b, spread_c, measured)


def leverage(baseline: PowerLaw, flops: float, loss: float) -> Leverage:
    """Return the compute leverage: FLOPs that the baseline needs for a loss, over those that reached it.

    It is the measure by which arXiv 2603.28743 finds 1.58 for HyperP over Muon.

    Args:
        baseline: the law of the baseline.
        flops: FLOPs that were used.
        loss: the loss that they reached, in nats per token.

    Raises:
        ValueError: the baseline never reaches the loss, or only far outside its points.
    """
    if loss <= baseline.C:
        raise ValueError(
            f"the loss {loss:.4f} is not above the baseline's irreducible loss C = {baseline.C:.4f}, so the baseline's"
            " law never reaches it; measure the baseline at more FLOPs"
        )
    needed = baseline.flops_for(loss)
    least, largest = baseline.flops
    extrapolation = max(1.0, needed / largest, least / needed)
    if extrapolation > MAX_EXTRAPOLATION:
        raise ValueError(
            f"the baseline needs {needed:.3g} FLOPs for the loss {loss:.4f}, {extrapolation:.3g} times outside its"
            f" points ({least:.3g} to {largest:.3g} FLOPs; {MAX_EXTRAPOLATION:g} times are allowed); measure it there"
        )
    return Leverage(needed / flops, needed, extrapolation)
