"""Newton-Schulz orthogonalization of batches of equal-shape matrices; no communication, no Megatron.

The iteration maps every singular value of X towards 1 while it keeps the singular vectors: with the quintic
polynomial p(s) = a s + b s^3 + c s^5, each step is X <- a X + (b A + c A^2) X, A = X X^T (Muon, K. Jordan 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.magnitudes import largest_elements, power_of_two

Coefficients = tuple[float, float, float]

# One (a, b, c) a step; further steps repeat the last.
COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    # Tuned per step for five steps in low precision; HyperP (arXiv 2603.28743) and Emerging-Optimizers use this set.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Minimax-optimal per step for singular values in [1e-3, 1] (Polar Express, arXiv 2505.16932).
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}
# Polar Express tolerates rounding above 1 when X, and all steps but the last of its set, are shrunk by this factor.
POLAR_EXPRESS_SAFETY = 1.01
# In place of the norm of a zero matrix, which stays zero. Matrices are scaled first, so that no other norm is as small.
SMALLEST_NORM = 1e-30
# So many matrices of any size, of two bytes or more an element, are whole cache lines of 64 bytes.
ALIGNED_RUN = 32
FORMS = ("auto", "standard", "gram")
# What computes symmetric products: PyTorch, or the optional kernels of Dao-AILab/quack (setup.py's extra "kernels").
BACKENDS = ("torch", "quack")
QUACK_PACKAGE = "quack-kernels>=0.6,<0.7"
# Its kernel computes the squares of this side on and above the diagonal, and needs rows of whole 16 bytes.
QUACK_TILE = 256
QUACK_MULTIPLE = 8


def coefficient_schedule(name: str, steps: int) -> list[Coefficients]:
    """Return one (a, b, c) for each of ``steps`` steps.

    Raises:
        ValueError: an unknown set, or no steps.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients is {name!r}; known sets are {', '.join(COEFFICIENTS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    table = COEFFICIENTS[name]
    schedule = [table[min(step, len(table) - 1)] for step in range(steps)]
    if name == "polar_express":
        s = POLAR_EXPRESS_SAFETY
        schedule = [(a / s, b / s**3, c / s**5) if (a, b, c) != table[-1] else (a, b, c) for a, b, c in schedule]
    return schedule


@functools.cache
def check_backend(backend: str, dtype: torch.dtype) -> None:
    """See that ``backend`` can compute symmetric products of ``dtype`` on this machine: nothing else ever stands in.

    Raises:
        ValueError: an unknown backend.
        UsageError: "quack" without a GPU of Hopper (SM90) or later, without its package, or neither in fp16 nor bf16.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; known are {', '.join(BACKENDS)}")
    if backend == "quack" and (lack := _quack_lack(dtype)):
        raise UsageError(f"backend 'quack' {lack}, or take backend 'torch'")


def _quack_lack(dtype: torch.dtype) -> str | None:
    """What quack lacks here to compute in ``dtype``, and how to mend it; None if nothing."""
    capability = device.compute_capability()
    if capability is None:
        return "needs a CUDA device, and there is none here; run where there is one"
    if capability < (9, 0):
        found = ".".join(map(str, capability))
        return f"needs compute capability 9.0 (H100) or more, this GPU has {found}; run on a newer one"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in fp16 or bf16, dtype is {dtype}; give one of those"
    try:
        from quack.gemm_interface import gemm_symmetric  # type: ignore # noqa: F401
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return f"needs the package quack-kernels ({reason}); pip install '{QUACK_PACKAGE}'"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonSchulz:
    """How to orthogonalize: schedule, precision, form and backend; a call does it.

    The Gram form (Dao-AILab, gram-newton-schulz) iterates on R = X X^T alone and multiplies X once at the end; it needs
    fewer FLOPs for matrices more than 1.5 times as long as wide (1.2 times where symmetric products are mirrored).

    Attributes:
        steps: Newton-Schulz steps.
        coefficients: a key of :data:`COEFFICIENTS`.
        dtype: precision of the iteration.
        form: "standard", "gram", or "auto" for the one with fewer FLOPs. The Gram form restarts once from X to keep its
            rounding small; in bf16 that is not enough: it is refused, and auto stays standard.
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
    def segments(self) -> list[list[Coefficients]]:
        """The schedule, cut where the Gram form restarts from X: after two steps in half precision, else after three.

        X X^T squares the spread of the singular values, and with it the rounding of the small ones. Without a restart
        the error in fp32 is a hundredfold once the spread reaches 100, as that of momenta does; with one it stays
        within a factor of ten of the standard form's (tests/unit/test_optimizers.py).
        """
        schedule = coefficient_schedule(self.coefficients, self.steps)
        cut = 2 if self.dtype in (torch.float16, torch.bfloat16) else 3
        return [segment for segment in (schedule[:cut], schedule[cut:]) if segment]

    def flops(self, rows: int, columns: int, form: str) -> int:
        """FLOPs of one matrix in "standard" or "gram" form, a multiply and an add counted as two.

        With whole symmetric products five steps need 20 n^2 m + 10 n^3, in Gram form 8 n^2 m + 28 n^3 (n <= m). What a
        device or backend mirrors instead of computing is not counted.
        """
        n, m = sorted((rows, columns))
        if form == "standard":
            return round(self.steps * (self._symmetric_flops(n, m) + self._symmetric_flops(n, n) + 2 * n * n * m))
        long_products = len(self.segments) * (self._symmetric_flops(n, m) + 2 * n * n * m)
        return round(long_products) + self.polynomial_flops(n)

    def polynomial_flops(self, n: int) -> int:
        """FLOPs of the Gram form on [n, n] matrices alone: per step R^2, Q Z, R Z and Z R Z, less what comes free."""
        return round(sum((4 * len(segment) - 3) * self._symmetric_flops(n, n) for segment in self.segments))

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
        return POLAR_EXPRESS_SAFETY if self.coefficients == "polar_express" else 1.0

    def _standard(self, x: torch.Tensor) -> torch.Tensor:
        for a, b, c in coefficient_schedule(self.coefficients, self.steps):
            gram = symmetric_product(x, x.mT, backend=self.backend)
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


def symmetric_product(
    left: torch.Tensor,
    right: torch.Tensor,
    add: torch.Tensor | None = None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    backend: str = "torch",
) -> torch.Tensor:
    """Return left right, or alpha left right + beta add, [batch, n, n], which must be symmetric.

    Where the device gains from it, or the backend does it, blocks below the diagonal are mirrored, not computed.

    Args:
        left: [batch, n, k].
        right: [batch, k, n].
        add: [batch, n, n], or None for no sum.
        beta: factor of ``add``.
        alpha: factor of the product.
        backend: one of :data:`BACKENDS`.

    Raises:
        ValueError: an unknown backend, one that cannot run here, or sizes that it does not take.
    """
    if backend != "torch":
        check_backend(backend, left.dtype)
        return _quack_product(left, right, add, beta=beta, alpha=alpha)
    size = left.shape[1]
    blocks = device.symmetric_blocks(size)
    if blocks == 1:
        if add is None:
            return left @ right
        return torch.baddbmm(add, left, right, beta=beta, alpha=alpha)
    result = left.new_empty((len(left), size, size))
    height = -(-size // blocks)
    for low in range(0, size, height):
        high = min(low + height, size)
        rows, columns = left[:, low:high], right[:, :, low:]
        if add is None:
            result[:, low:high, low:] = torch.bmm(rows, columns)
        else:
            result[:, low:high, low:] = torch.baddbmm(add[:, low:high, low:], rows, columns, beta=beta, alpha=alpha)
        result[:, high:, low:high] = result[:, low:high, high:].mT
    return result


def _quack_product(
    left: torch.Tensor, right: torch.Tensor, add: torch.Tensor | None, *, beta: float, alpha: float
) -> torch.Tensor:
    """:func:`symmetric_product` by quack, on SM90 and later, in fp16 or bf16, accumulated in fp32.

    Written against ``quack.gemm_interface.gemm_symmetric(A, B, C=None, ..., alpha=1.0, beta=1.0)`` of quack-kernels
    0.6.0 to 0.6.5: A [batch, n, k], B [batch, k, n] and C [batch, n, n], each with rows or columns contiguous, give a
    new alpha A B + beta C. The first call for a dtype and layout compiles the kernel.
    """
    from quack.gemm_interface import gemm_symmetric

    if left.shape[1] % QUACK_MULTIPLE or left.shape[2] % QUACK_MULTIPLE:
        raise UsageError(
            f"backend 'quack' takes sizes that are multiples of {QUACK_MULTIPLE}, got the shape {tuple(left.shape)};"
            " take backend 'torch'"
        )
    if add is None:
        return gemm_symmetric(left, right)
    # It tells constants from tensors by isinstance(_, float): an integer would be taken for a tensor.
    return gemm_symmetric(left, right, C=add, alpha=float(alpha), beta=float(beta))


def gram_polynomial(gram: torch.Tensor, segment: Sequence[Coefficients], *, backend: str = "torch") -> torch.Tensor:
    """Return Q with Q X = the result of the steps in ``segment`` on X, from R = X X^T alone.

    Per step, Z = b R + c R^2; Q <- (Z + a) Q; R <- (Z + a) R (Z + a). All are polynomials in R and commute.

    Args:
        gram: R, [batch, n, n].
        segment: one (a, b, c) a step.
        backend: what computes the products, one of :data:`BACKENDS`.
    """
    multiply = functools.partial(symmetric_product, backend=backend)
    product: torch.Tensor | None = None
    for step, (a, b, c) in enumerate(segment):
        z = multiply(gram, gram, gram, beta=b, alpha=c)
        if product is None:
            product = z.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = multiply(product, z, product, beta=a)
        if step < len(segment) - 1:
            shifted = multiply(gram, z, gram, beta=a)
            gram = multiply(z, shifted, shifted, beta=a)
    assert product is not None
    return product


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
        coefficients: a key of :data:`COEFFICIENTS`.
        dtype: precision of the iteration; the normalization before it is in fp32 (fp64 for fp64 input).
        form: "standard", "gram" or "auto".
        backend: "torch" or "quack".
    """
    return NewtonSchulz(steps=steps, coefficients=coefficients, dtype=dtype, form=form, backend=backend)(x)
