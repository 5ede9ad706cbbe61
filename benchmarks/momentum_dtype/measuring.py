"""How much a rounded momentum changes the orthogonalized update: of real momenta, and of matrices of known spectra."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.rounded import restored, round_to_half

# What is kept of a momentum [count, rows, columns] fp32 from one step to the next.
KEPT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp32": lambda x: x,
    "bf16": lambda x: x.bfloat16().float(),
    "fp16": lambda x: restored(*round_to_half(x)),
}
ROUNDED = ("bf16", "fp16")
# Singular values s_k, k = 1, 2, ..., n; None: of a matrix of normal numbers.
SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "Gaussian": None,
    "1/k": lambda k: 1 / k,
    "1/k^1.5": lambda k: k**-1.5,
    "1/k^2": lambda k: k**-2,
    "10^0 to 10^-4": lambda k: 10.0 ** (-4 * (k - 1) / (k.max() - 1)),
}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||value - reference|| / ||reference||."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


class Momenta:
    """The momentum of one matrix, kept in every precision of :data:`KEPT` from the first step on.

    Args:
        shape: [rows, columns].
        momentum: mu.
    """

    def __init__(self, shape: tuple[int, int], momentum: float) -> None:
        self.momentum = momentum
        self.kept = {name: torch.zeros(1, *shape) for name in KEPT}
        # What is orthogonalized in this step; nothing of it is rounded but the momentum of the step before.
        self.updates: dict[str, torch.Tensor] = {}

    def add(self, gradient: torch.Tensor) -> None:
        """Take in a gradient [rows, columns] fp32."""
        for name, keep in KEPT.items():
            updated = self.kept[name] * self.momentum + gradient
            self.updates[name] = self.momentum * updated + gradient
            self.kept[name] = keep(updated)

    def changes(self, orthogonalize: NewtonSchulz) -> dict[str, tuple[float, float]]:
        """Return relative changes of the kept momentum and of the orthogonalized update, by precision."""
        exact = orthogonalize(self.updates["fp32"])
        return {
            name: (
                relative(self.kept[name], self.kept["fp32"]),
                relative(orthogonalize(self.updates[name]), exact),
            )
            for name in ROUNDED
        }


def iteration_errors(updates: torch.Tensor, coefficients: str) -> dict[str, float]:
    """Return the relative error of Newton-Schulz itself in bf16 (standard form) and fp16, for comparison."""
    exact = NewtonSchulz(coefficients=coefficients, dtype=torch.float32, form="standard")(updates)
    return {
        name: relative(NewtonSchulz(coefficients=coefficients, dtype=dtype, form="standard")(updates), exact)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }


def matrix_of(spectrum: str, rows: int, columns: int) -> torch.Tensor:
    """Return a matrix [1, rows, columns] fp32 with singular values of :data:`SPECTRA` and random singular vectors."""
    random = torch.Generator().manual_seed(0)
    values = SPECTRA[spectrum]
    if values is None:
        return torch.randn(1, rows, columns, generator=random)
    short = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, short, generator=random, dtype=torch.float64))[0] for size in (rows, columns)
    )
    return ((left * values(torch.arange(1, short + 1, dtype=torch.float64))) @ right.mT).float()[None]


def spectrum_row(spectrum: str, rows: int, columns: int, coefficients: str) -> Mapping[str, float]:
    """Return the relative change of the orthogonalized matrix when it is rounded once, by precision."""
    x = matrix_of(spectrum, rows, columns)
    orthogonalize = NewtonSchulz(coefficients=coefficients, dtype=torch.float32, form="standard")
    exact = orthogonalize(x)
    return {name: relative(orthogonalize(KEPT[name](x)), exact) for name in ROUNDED}
