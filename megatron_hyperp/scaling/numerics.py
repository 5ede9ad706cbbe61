"""The least squares behind the fits: a parabola, a power law with a constant, and the jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

# A parabola that rises by less than this share of the loss has no minimum but that of rounding.
FLAT = 1e-9
# Residuals of log loss count linearly beyond this: the seed noise of a loss, and the value of Chinchilla's third
# approach (arXiv 2203.15556, D.2).
HUBER = 1e-3
# Bounds of the exponent of L = A F^-b + C, how many values between them are tried, and how many are starts.
LEAST_EXPONENT, LARGEST_EXPONENT = 1e-3, 3.0
TRIED, STARTS = 60, 3


def listed(values: Array) -> str:
    """Losses for a message."""
    return ", ".join(f"{value:.4f}" for value in values)


def mean_losses(
    lrs: Sequence[float], losses: Sequence[float], seeds: Sequence[Hashable] | None = None
) -> dict[float, float]:
    """Return the mean loss over seeds by learning rate, ascending; infinite where a seed's loss is not finite.

    Where not every seed was trained at every learning rate, as a search leaves it, a plain mean would depend on which
    were: a seed's losses are all a little high, or low. So the means are those of losses m(lr) + s(seed), the s being
    0 on average, by least squares; with every seed everywhere these are plain means.

    Args:
        lrs: learning rates; they are rounded to nine digits, for what a sweep computes may differ in the last ones.
        losses: of each training.
        seeds: of each training; None: one seed, or as if.
    """
    rounded = [float(f"{lr:.9g}") for lr in lrs]
    bad = {lr for lr, loss in zip(rounded, losses, strict=True) if not math.isfinite(loss)}
    grid = sorted(set(rounded) - bad)
    means = dict.fromkeys(sorted(set(rounded)), math.inf)
    named = seeds or [0] * len(rounded)
    rows = [(lr, loss, seed) for lr, loss, seed in zip(rounded, losses, named, strict=True) if lr not in bad]
    known = list(dict.fromkeys(seed for _, _, seed in rows))
    # One column for each lr, then one for each seed but the last, which is minus the sum of the others.
    design = np.zeros((len(rows), len(grid) + len(known)))
    for row, (lr, _, seed) in enumerate(rows):
        design[row, grid.index(lr)] = design[row, len(grid) + known.index(seed)] = 1.0
    design = np.hstack([design[:, : len(grid)], design[:, len(grid) : -1] - design[:, -1:]])
    solution = np.linalg.lstsq(design, np.array([loss for _, loss, _ in rows]))[0] if rows else []
    return means | dict(zip(grid, map(float, solution), strict=False))


def jackknife(points: int, estimate: Callable[[Indices], float | Array]) -> Array:
    """Return the standard error of an estimate from its values with each of the points left out.

    Args:
        points: their number n.
        estimate: of some of the points, by their indices. Where it raises ``ValueError`` for one choice of n - 1
            points, the standard error is infinite.
    """
    try:
        values = np.array([estimate(np.delete(np.arange(points), left_out)) for left_out in range(points)])
    except ValueError:
        return np.array(math.inf)
    return np.sqrt((points - 1) / points * np.sum((values - values.mean(axis=0)) ** 2, axis=0))


def parabola(u: Array, y: Array, weights: Array) -> tuple[float, float, float]:
    """Return (u0, y0, c) of the parabola y0 + c (u - u0)^2 of weighted least squares.

    Raises:
        ValueError: it has no minimum.
    """
    curvature, slope, constant = (float(value) for value in np.polyfit(u, y, 2, w=np.sqrt(weights)))
    if curvature * float(np.ptp(u)) ** 2 <= FLAT * abs(constant):
        raise ValueError(
            f"the losses about the lowest one ({listed(y)}, by increasing lr) are flat or not convex; add seeds, or"
            " learning rates further away"
        )
    shift = -slope / (2 * curvature)
    return shift, constant - curvature * shift**2, curvature


def power_law_parameters(x: Array, y: Array) -> Array:
    """Return (ln A, b, C) of A x^-b + C, b and C within their bounds, by robust least squares from several starts.

    The starts are those of many exponents, with A and C of relative least squares, that come closest to the points.

    Args:
        x: abscissae about 1, any order.
        y: positive ordinates.
    """
    tried = []
    for exponent in np.geomspace(LEAST_EXPONENT, LARGEST_EXPONENT, TRIED):
        columns = np.stack([x**-exponent, np.ones_like(x)], axis=1) / y[:, None]
        (a, c), distance = optimize.nnls(columns, np.ones_like(y))
        tried.append((distance, math.log(max(a, 1e-6 * float(y.min()))), float(exponent), float(c)))
    starts = [np.array(start) for _, *start in sorted(tried)[:STARTS]]
    return min((_descend(x, y, start) for start in starts), key=lambda solution: solution[0])[1]


def _descend(x: Array, y: Array, start: Array) -> tuple[float, Array]:
    """Return the cost and (ln A, b, C) that one start leads to."""
    ln_x, ln_y = np.log(x), np.log(y)
    # The bounds of ln A, wide as they are, keep the search from overflows.
    low = np.array([float(ln_y.min()) - 20.0, LEAST_EXPONENT, 0.0])
    high = np.array([float(ln_y.max()) + 20.0, LARGEST_EXPONENT, float(y.min())])

    def residuals(parameters: Array) -> Array:
        log_a, b, c = parameters
        return np.log(np.exp(log_a - b * ln_x) + c) - ln_y

    def jacobian(parameters: Array) -> Array:
        log_a, b, c = parameters
        falling = np.exp(log_a - b * ln_x)
        return np.stack([falling, -ln_x * falling, np.ones_like(x)], axis=1) / (falling + c)[:, None]

    inside = np.clip(start, low + 1e-9, high - 1e-9)
    precise = {"xtol": 1e-12, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 2000}
    solution = optimize.least_squares(
        residuals, inside, jacobian, bounds=(low, high), loss="huber", f_scale=HUBER, **precise
    )
    return float(solution.cost), np.asarray(solution.x)


def at_bound(exponent: float) -> bool:
    """Whether an exponent of :func:`power_law_parameters` is that of its bounds, not of the points."""
    return not 1.01 * LEAST_EXPONENT < exponent < 0.99 * LARGEST_EXPONENT


def distinct(values: Array) -> int:
    """Number of different values."""
    return len(np.unique(values))
