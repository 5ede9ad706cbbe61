"""Newton-Schulz orthogonalization of batches of equal-shape matrices; no communication, no Megatron.

The iteration maps every singular value of X towards 1 while it keeps the singular vectors: with the quintic
polynomial p(s) = a s + b s^3 + c s^5, each step is X <- a X + (b A + c A^2) X, A = X X^T (Muon, K. Jordan 2024).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from megatron_hyperp import device
from megatron_hyperp.coefficients import Coefficients, coefficient_schedule, coefficient_set
from megatron_hyperp.optim.magnitudes import largest_elements, power_of_two
from megatron_hyperp.optim.products import QUACK_TILE, check_backend, gram_polynomial, symmetric_product
from megatron_hyperp.optim.restarts import restarts

# In place of the norm of a zero matrix, which stays zero. Matrices are scaled first, so that no other norm is as small.
SMALLEST_NORM = 1e-30
# So many matrices of any size, of two bytes or more an element, are whole cache lines of 64 bytes.
ALIGNED_RUN = 32
FORMS = ("auto", "standard", "gram")
# Set, steps and precision whose restarts are kept as they were in recorded runs, whatever the rule says.
RECORDED_RESTARTS: dict[tuple[str, int, torch.dtype], tuple[int, ...]] = {("quintic", 5, torch.float32): (3,)}


@functools.cache
def _segments(coefficients: str, steps: int, dtype: torch.dtype) -> tuple[tuple[Coefficients, ...], ...]:
    """The schedule, cut where the Gram form restarts from X."""
    schedule = coefficient_schedule(coefficients, steps)
    cuts = RECORDED_RESTARTS.get((coefficients, steps, dtype))
    if cuts is None:
        cuts = restarts(schedule, torch.finfo(dtype).eps / 2, coefficient_set(coefficients).margin)
    edges = [0, *cuts, steps]
    return tuple(schedule[first:last] for first, last in itertools.pairwise(edges))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonSchulz:
    """How to orthogonalize: schedule, precision, form and backend; a call does it.

    The Gram form (Dao-AILab, gram-newton-schulz) iterates on R = X X^T alone and multiplies X once at the end; it needs
    fewer FLOPs for matrices more than 1.5 times as long as wide (1.2 times where symmetric products are mirrored).

    Attributes:
        steps: Newton-Schulz steps.
        coefficients: a key of :data:`~megatron_hyperp.coefficients.SETS`.
        dtype: precision of the iteration.
        form: "standard", "gram", or "auto" for the one with fewer FLOPs. The Gram form restarts from X where its error
            would be too large; in bf16 that is not enough: it is refused, and auto stays standard.
        backend: what computes symmetric products: "torch", or "quack", whose kernel computes half of each and mirrors
            it. The long products with X, which are not symmetric, are PyTorch's in either case.

    Raises:
        ValueError: an unknown set, form or backend, no steps, the Gram form in bf16, or a backend that cannot run here
            (a :class:`UsageError`, see :func:`check_backend`).
    """

    steps: int = 5
    coefficients: str = "quintic"
    dtype: torch.dtype = torch.bfloat16
    form: str = "auto"
    backend: str = "torch"

    def __post_init__(self) -> None:
        coefficient_schedule(self.coefficients, self.steps)
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; known are {', '.join(FORMS)}")
        if self.form == "gram" and self.dtype == torch.bfloat16:
            raise ValueError("the Gram form loses accuracy in bf16; use fp16 or fp32, or the standard form")
        check_backend(self.backend, self.dtype)

    @property
    def segments(self) -> tuple[tuple[Coefficients, ...], ...]:
        """The schedule, cut where the Gram form restarts from X; see :mod:`megatron_hyperp.optim.restarts`.

        X X^T squares the spread of the singular values, and with it the rounding of the small ones. Without a restart
        the error of five quintic steps is a hundredfold once the spread reaches 100, as that of momenta does.
        """
        return _segments(self.coefficients, self.steps, self.dtype)

    def flops(self, rows: int, columns: int, form: str) -> int:
        """FLOPs of one matrix in "standard" or "gram" form, a multiply and an add counted as two.

        With whole symmetric products five steps need 20 n^2 m + 10 n^3, in Gram form 8 n^2 m + 28 n^3 (n <= m). What a
        device or backend mirrors instead of computing is not counted.
        """
        n, m = sorted((rows, columns))
        if form == "standard":
            schedule = coefficient_schedule(self.coefficients, self.steps)
            squares = sum(c != 0 for _, _, c in schedule) * self._symmetric_flops(n, n)
            return round(self.steps * (self._symmetric_flops(n, m) + 2 * n * n * m) + squares)
        long_products = len(self.segments) * (self._symmetric_flops(n, m) + 2 * n * n * m)
        return round(long_products) + self.polynomial_flops(n)

    def polynomial_flops(self, n: int) -> int:
        """FLOPs of the Gram form on [n, n] matrices alone: per step R^2, Q Z, R Z and Z R Z, less what comes free.

        Free are R^2 in a cubic step, Q Z in the first step of a segment, and the next R in its last.
        """
        squares = sum(c != 0 for segment in self.segments for _, _, c in segment)
        products = squares + sum(3 * (len(segment) - 1) for segment in self.segments)
        return round(products * self._symmetric_flops(n, n))

    def _symmetric_flops(self, n: int, k: int) -> float:
        """FLOPs of a symmetric product of [n, k] with [k, n] on this device: blocks below the diagonal come free."""
        blocks = -(-n // QUACK_TILE) if self.backend == "quack" else device.symmetric_blocks(n)
        return 2 * n * n * k * (blocks + 1) / (2 * blocks)

    def form_of(self, rows: int, columns: int) -> str:
        """Return "standard" or "gram" for matrices of this shape."""
        if self.form != "auto":
            return self.form
        allowed = self.dtype != torch.bfloat16
        fewer = self.flops(rows, columns, "gram") < self.flops(rows, columns, "standard")
        return "gram" if allowed and fewer else "standard"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Orthogonalize [m, n], or each matrix of [batch, m, n]; a zero matrix stays zero.

        Any other finite matrix, down to denormal and up to the largest numbers, gives what a rescaled copy gives: the
        same bits if the factor is a power of two.

        Returns:
            A tensor of the shape and dtype of ``x`` whose singular values are near 1.

        Raises:
            ValueError: ``x`` is neither 2-D nor 3-D.
        """
        if x.ndim not in (2, 3):
            raise ValueError(f"newton_schulz takes [m, n] or [batch, m, n], got the shape {tuple(x.shape)}")
        batch = x.unsqueeze(0) if x.ndim == 2 else x
        # The Gram matrix is taken on the short side: fewer FLOPs, and the same result by symmetry.
        transposed = batch.shape[1] > batch.shape[2]
        if transposed:
            batch = batch.mT
        bounds = _chunks(len(batch), batch.shape[1] * batch.shape[2] * self.dtype.itemsize)
        if len(bounds) == 1:
            result = self._orthogonalize(batch)
        else:
            result = batch.new_empty(batch.shape)
            for low, high in bounds:
                result[low:high] = self._orthogonalize(batch[low:high])
        return (result.mT if transposed else result).reshape(x.shape)

    def _orthogonalize(self, batch: torch.Tensor) -> torch.Tensor:
        """Orthogonalize [batch, n, m] with n <= m, all at once."""
        iterate = self._gram if self.form_of(*batch.shape[1:]) == "gram" else self._standard
        return iterate(self._normalize(batch).to(self.dtype)).to(batch.dtype)

    def _normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """Scale each matrix to Frobenius norm 1, at least in fp32, which bounds its singular values by 1.

        Matrices of any finite size: see :mod:`~megatron_hyperp.optim.magnitudes`.
        """
        batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
        batch = batch * power_of_two(largest_elements(batch))
        norms = torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True)
        return batch.div_((norms * self.norm_margin).clamp_min(SMALLEST_NORM))

    @property
    def norm_margin(self) -> float:
        """Factor by which the norm before the first step stays below 1."""
        return coefficient_set(self.coefficients).margin

    def _standard(self, x: torch.Tensor) -> torch.Tensor:
        for a, b, c in coefficient_schedule(self.coefficients, self.steps):
            gram = symmetric_product(x, x.mT, backend=self.backend)
            if c == 0:
                x = torch.baddbmm(x, gram, x, beta=a, alpha=b)
                continue
            polynomial = symmetric_product(gram, gram, gram, beta=b, alpha=c, backend=self.backend)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        return x

    def _gram(self, x: torch.Tensor) -> torch.Tensor:
        for segment in self.segments:
            gram = symmetric_product(x, x.mT, backend=self.backend)
            x = gram_polynomial(gram, segment, backend=self.backend) @ x
        return x


def _chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Cut ``count`` matrices of ``size`` bytes into the runs [low, high) that the device takes at once.

    The cut changes no bits. How a CPU rounds a tiny matrix of odd shape (16 x 5) depends on where in a cache line it
    begins, so small ones are cut into multiples of :data:`ALIGNED_RUN`: each then begins where it would in one batch.
    The last run takes the rest, which alone might be one matrix, and slow.
    """
    limit = device.newton_schulz_chunk()
    if limit is None:
        return [(0, count)]
    length = max(1, limit // max(1, size))
    if length > ALIGNED_RUN:
        length -= length % ALIGNED_RUN
    lows = [index * length for index in range(max(1, count // length))]
    return list(zip(lows, [*lows[1:], count], strict=True))


def newton_schulz(
    x: torch.Tensor,
    *,
    steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    form: str = "auto",
    backend: str = "torch",
) -> torch.Tensor:
    """Orthogonalize a matrix, or each matrix of a batch; see :class:`NewtonSchulz` for the arguments and errors.

    Args:
        x: [m, n] or [batch, m, n]; a zero matrix stays zero.
        steps: Newton-Schulz steps.
        coefficients: a key of :data:`~megatron_hyperp.coefficients.SETS`.
        dtype: precision of the iteration; the normalization before it is in fp32 (fp64 for fp64 input).
        form: "standard", "gram" or "auto".
        backend: "torch" or "quack".
    """
    return NewtonSchulz(steps=steps, coefficients=coefficients, dtype=dtype, form=form, backend=backend)(x)
