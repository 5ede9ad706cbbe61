"""Where the Gram form of Newton-Schulz restarts from X: a first-order analysis of its rounding errors.

R = X X^T holds squares of singular values, so that its rounding harms small ones more than that of X does. Restarts
bound the harm, and each costs two long products. How much a restart saves follows from the set of coefficients:

* Every computed matrix is the exact one plus noise of unit roundoff times the norm of the terms that were summed, the
  same for each element. In the basis of X's singular vectors such noise is again alike for all elements.
* A matrix polynomial f(A) turns noise E in A into f[a_i, a_j] E_ij, with the divided difference
  f[x, y] = (f(x) - f(y)) / (x - y) (Daletskii and Krein; N. Higham, Functions of Matrices, 2008, section 3.3). An odd
  function of X does so with f[x_i, x_j] on symmetric noise, and with (f(x_i) + f(x_j)) / (x_i + x_j) on the rest.
* Variances add. The error of the standard form is predicted in the same way, and their ratio depends on no precision.

Predicted ratios are within a factor of two of measured ones (tests/unit/test_restarts.py). They hold as long as noise
moves eigenvalues of R by little, which half precision limits further.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_hyperp.coefficients import Coefficients

Array = npt.NDArray[np.float64]

# The Gram form's error may be this many times the standard form's, in the root of the sum over SPECTRA.
FACTOR = 10.0
# Noise may move an eigenvalue of R, which is at most about 1, by this much. Beyond, fp16 turns into NaN.
LARGEST_SHIFT = 0.5
# Steps between restarts, at most: another two long products among thirty others cost little.
LONGEST_SEGMENT = 8
_SIZE = 48
# Singular values as momenta have them, from flat to steep.
SPECTRA: dict[str, Array] = {
    "1/k": 1.0 / np.arange(1, _SIZE + 1),
    "1/k^2": np.arange(1.0, _SIZE + 1) ** -2.0,
    "10^0 to 10^-4": np.logspace(0, -4, _SIZE),
}


def _rows(values: Array) -> Array:
    return values[:, :, None]


def _columns(values: Array) -> Array:
    return values[:, None, :]


def _norm(values: Array) -> Array:
    """Frobenius norms of matrices with these eigenvalues, [spectra]."""
    return np.linalg.norm(values, axis=-1)


def _divided(f: Array, x: Array, slope: Array) -> Array:
    """Divided differences f[x_i, x_j], [spectra, n, n]; the slope where the two are the same."""
    distance = _rows(x) - _columns(x)
    same = distance == 0
    quotients = (_rows(f) - _columns(f)) / np.where(same, 1.0, distance)
    return np.where(same, np.broadcast_to(_rows(slope), quotients.shape), quotients)


class ErrorModel:
    """Predicts rounding errors of a schedule on :data:`SPECTRA`; variances are in squares of the unit roundoff.

    Attributes:
        values: singular values before each step and after the last, each [spectra, n].
    """

    def __init__(self, schedule: Sequence[Coefficients], margin: float = 1.0) -> None:
        spectra = np.stack(list(SPECTRA.values()))
        self._schedule = schedule
        self.values = self._iterates(spectra / _norm(spectra)[:, None] / margin)
        # Singular values between 0 and 1 at all, for the largest shift.
        self._range = self._iterates(np.linspace(0.0, 1.0 / margin, 512))
        self._later = [self._amplification(step) for step in range(len(schedule) + 1)]

    def _iterates(self, values: Array) -> list[Array]:
        result = [values]
        for a, b, c in self._schedule:
            s = result[-1]
            result.append(s * (a + b * s**2 + c * s**4))
        return result

    def _amplification(self, step: int) -> Array:
        """Squared factor by which the steps from ``step`` on multiply noise in X, [spectra, n, n]."""
        x, f = self.values[step], self.values[-1]
        slope = np.ones_like(x)
        for (a, b, c), s in zip(self._schedule[step:], self.values[step:], strict=False):
            slope = slope * (a + 3 * b * s**2 + 5 * c * s**4)
        symmetric, skew = _divided(f, x, slope), (_rows(f) + _columns(f)) / (_rows(x) + _columns(x))
        return (symmetric**2 + skew**2) / 2

    def _variance(self, size: Array | float, amplitude: Array | float, step: int) -> Array:
        """Variance in the result, [spectra], of noise of norm ``size`` that reaches X before ``step``."""
        noise = np.broadcast_to(np.asarray(size) / _SIZE, len(SPECTRA))
        return noise**2 * (amplitude**2 * self._later[step]).sum(axis=(1, 2))

    def _polynomial(self, first: int, last: int) -> tuple[Array, Array]:
        """Q(r) of the steps [first, last) on eigenvalues of R, and its divided differences."""
        start = self.values[first] ** 2
        r, q = start, np.ones_like(start)
        q_slope, r_slope = np.zeros_like(start), np.ones_like(start)
        for a, b, c in self._schedule[first:last]:
            f, f_slope = a + b * r + c * r**2, b + 2 * c * r
            q_slope, q = q_slope * f + q * f_slope * r_slope, q * f
            r_slope, r = r_slope * f * (f + 2 * r * f_slope), r * f**2
        return q, _divided(q, start, q_slope)

    def input(self) -> Array:
        """Variance from rounding X before the first step."""
        return self._variance(_norm(self.values[0]), 1.0, 0)

    def standard(self) -> Array:
        """Variance of the standard form: A = X X^T, B = b A + c A^2, X <- a X + B X."""
        total = self.input()
        for step, ((a, b, c), s) in enumerate(zip(self._schedule, self.values, strict=False)):
            r, x = s**2, _columns(s)
            total = total + self._variance(_norm(r), (b + c * (_rows(r) + _columns(r))) * x, step + 1)
            total = total + self._variance(abs(b) * _norm(r) + abs(c) * _norm(r**2), x, step + 1)
            total = total + self._variance(abs(a) * _norm(s) + _norm((b * r + c * r**2) * s), 1.0, step + 1)
        return total

    def segment(self, first: int, last: int) -> Array:
        """Variance that the steps [first, last) add in Gram form, started from X; see ``gram_polynomial``."""
        x, before = _columns(self.values[first]), np.ones_like(self.values[first])
        size = _norm(self.values[first] ** 2)
        total = np.zeros(len(SPECTRA))
        for step in range(first, last):
            a, b, c = self._schedule[step]
            r = self.values[step] ** 2
            z = b * r + c * r**2
            after, shifted = before * (z + a), r * (z + a)
            _, whole = self._polynomial(step, last)
            rest, rest_divided = self._polynomial(step + 1, last)
            # Noise in R, of which all that follows is made.
            total = total + self._variance(size, _rows(before) * whole * x, last)
            # Noise in Z = b R + c R^2, which goes into Q and into the next R.
            amplitude = _rows(before) * _columns(rest) + _rows(after) * rest_divided * (
                _rows(shifted) + _columns(shifted)
            )
            total = total + self._variance(abs(b) * _norm(r) + abs(c) * _norm(r**2), amplitude * x, last)
            # In Q (Z + a), and, but for the last step, in R (Z + a). That of the next R comes with the next step.
            size = abs(a) * _SIZE**0.5 if step == first else _norm(before * z) + abs(a) * _norm(before)
            total = total + self._variance(size, _columns(rest) * x, last)
            if step < last - 1:
                amplitude = _rows(after) * rest_divided * _rows(z + a)
                total = total + self._variance(_norm(r * z) + abs(a) * _norm(r), amplitude * x, last)
                size = _norm(z * shifted) + abs(a) * _norm(shifted)
            before = after
        # In Q X: of the result, and of the products that are summed, as if these were independent.
        summed = _norm(before) * _norm(self.values[first]) / _SIZE**0.5
        return total + self._variance(np.hypot(_norm(self.values[last]), summed), 1.0, last)

    def shift(self, first: int, last: int) -> float:
        """Largest change of an eigenvalue of R in the steps [first, last), for noise of 1 in any of their R."""
        largest = 0.0
        slope = np.ones_like(self._range[first])
        # The last R that is computed is the one before the last step.
        for step in reversed(range(first, last)):
            r = self._range[step] ** 2
            if step < last - 1:
                a, b, c = self._schedule[step]
                f = a + b * r + c * r**2
                slope = slope * f * (f + 2 * r * (b + 2 * c * r))
            largest = max(largest, float(r.max() * np.abs(slope).max()))
        return largest

    def ratios(self, cuts: Sequence[int]) -> dict[str, float]:
        """Predicted error of the Gram form with restarts before the steps ``cuts``, over the standard form's."""
        pairs = itertools.pairwise([0, *cuts, len(self._schedule)])
        variance = self.input() + sum(self.segment(first, last) for first, last in pairs)
        return dict(zip(SPECTRA, np.sqrt(variance / self.standard()).tolist(), strict=True))


@functools.cache
def restarts(schedule: tuple[Coefficients, ...], unit_roundoff: float, margin: float = 1.0) -> tuple[int, ...]:
    """Return the steps, from 1 on, before which the Gram form starts again from X.

    As few as keep the predicted error within :data:`FACTOR` of the standard form's and every shift of an eigenvalue
    within :data:`LARGEST_SHIFT`; of equally few, those with the smallest error. Where nothing does, before every step,
    which is as exact as the standard form.

    Args:
        schedule: one (a, b, c) a step.
        unit_roundoff: of the precision of the iteration, 2^-24 in fp32.
        margin: factor by which the norm before the first step stays below 1.
    """
    steps = len(schedule)
    with np.errstate(all="ignore"):
        model = ErrorModel(schedule, margin)
        standard = model.standard()

        @functools.cache
        def added(first: int, last: int) -> float:
            """Sum over spectra of squared ratios; NaN where shifts are too large."""
            allowed = model.shift(first, last) * unit_roundoff <= LARGEST_SHIFT
            return float((model.segment(first, last) / standard).sum()) if allowed else float("nan")

        # Smallest sum for the steps before each, by one segment more in each round.
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (float((model.input() / standard).sum()), ())}
        for _ in range(steps):
            reached: dict[int, tuple[float, tuple[int, ...]]] = {}
            for first, (total, cuts) in best.items():
                for last in range(first + 1, min(first + LONGEST_SEGMENT, steps) + 1):
                    candidate = (total + added(first, last), (*cuts, last))
                    if not candidate[0] <= FACTOR**2:
                        break
                    reached[last] = min(reached.get(last, candidate), candidate)
            if steps in reached:
                return reached[steps][1][:-1]
            best = reached
    return tuple(range(1, steps))
