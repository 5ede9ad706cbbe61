"""Matrices of known singular values, and how far Newton-Schulz on them is from float64."""

import torch

from megatron_hyperp.coefficients import SETS
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.restarts import SPECTRA


def with_spectrum(name: str, rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Return a float64 [rows, columns] matrix with singular values as of :data:`SPECTRA` and random vectors."""
    random, short = torch.Generator().manual_seed(seed), min(rows, columns)
    k = torch.arange(1, short + 1, dtype=torch.float64)
    steepest = torch.logspace(0, -4, short, dtype=torch.float64)
    values = {"1/k": 1 / k, "1/k^2": k**-2, "10^0 to 10^-4": steepest}
    assert values.keys() == SPECTRA.keys()
    left, right = (
        torch.linalg.qr(torch.randn(side, short, generator=random, dtype=torch.float64))[0] for side in (rows, columns)
    )
    return (left * values[name]) @ right.mT


def exact(x: torch.Tensor, coefficients: str, steps: int | None = None) -> torch.Tensor:
    """Return what Newton-Schulz of ``x`` is in float64, in standard form; ``steps``: those that the set is made for."""
    count = SETS[coefficients].steps if steps is None else steps
    return NewtonSchulz(coefficients=coefficients, steps=count, dtype=torch.float64, form="standard")(x.double())


def error(x: torch.Tensor, coefficients: str, dtype: torch.dtype, form: str, steps: int | None = None) -> float:
    """Return the relative error, in the Frobenius norm, of a precision and form against float64."""
    count = SETS[coefficients].steps if steps is None else steps
    iteration = NewtonSchulz(coefficients=coefficients, steps=count, dtype=dtype, form=form)
    right = exact(x, coefficients, count)
    return float((iteration(x.float()).double() - right).norm() / right.norm())
