"""Newton-Schulz orthogonalization of batches of equal-shape matrices; no communication, no Megatron.

The iteration maps every singular value of X towards 1 while it keeps the singular vectors: with the quintic
polynomial p(s) = a s + b s^3 + c s^5, each step is X <- a X + (b A + c A^2) X, A = X X^T (Muon, K. Jordan 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
SMALLEST_NORM = 1e-30


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


def newton_schulz(
    x: torch.Tensor, *, steps: int = 5, coefficients: str = "quintic", dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Orthogonalize a matrix, or each matrix of a batch.

    Args:
        x: [m, n] or [batch, m, n]; a zero matrix stays zero.
        steps: Newton-Schulz steps.
        coefficients: a key of :data:`COEFFICIENTS`.
        dtype: precision of the iteration; the normalization before it is in fp32 (fp64 for fp64 input).

    Returns:
        A tensor of the shape and dtype of ``x`` whose singular values are near 1.

    Raises:
        ValueError: ``x`` is neither 2-D nor 3-D, or the schedule is unknown.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"newton_schulz takes [m, n] or [batch, m, n], got the shape {tuple(x.shape)}")
    schedule = coefficient_schedule(coefficients, steps)
    batch = x.unsqueeze(0) if x.ndim == 2 else x
    # The Gram matrix A is taken on the short side: fewer FLOPs, and the same result by symmetry.
    transposed = batch.shape[1] > batch.shape[2]
    if transposed:
        batch = batch.mT
    batch = _iterate(_normalize(batch, coefficients).to(dtype), schedule).to(x.dtype)
    if transposed:
        batch = batch.mT
    return batch.reshape(x.shape)


def _normalize(batch: torch.Tensor, coefficients: str) -> torch.Tensor:
    """Scale each matrix to Frobenius norm 1 (at least fp32), which bounds its singular values by 1."""
    batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
    norms = torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True)
    if coefficients == "polar_express":
        norms = norms * POLAR_EXPRESS_SAFETY
    return batch / norms.clamp_min(SMALLEST_NORM)


def _iterate(x: torch.Tensor, schedule: Sequence[Coefficients]) -> torch.Tensor:
    """Run the standard form on [batch, rows <= columns] matrices."""
    for a, b, c in schedule:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
