"""Muon (K. Jordan 2024), and MuonH, the same on the hypersphere (arXiv 2603.28743)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.rules.base import Part, StateEntry, UpdateRule

if TYPE_CHECKING:
    from megatron_hyperp.optim.options import HyperPConfig


def momentum_(
    momenta: torch.Tensor, gradients: torch.Tensor, *, momentum: float = 0.95, nesterov: bool = True
) -> torch.Tensor:
    """Update M <- mu M + G in place and return what is orthogonalized: mu M + G (Nesterov) or M.

    Args:
        momenta: fp32 or bf16, any shape; updated in place.
        gradients: fp32, the same shape.
        momentum: mu.
        nesterov: look ahead by one step.

    Returns:
        fp32, whatever the momenta are rounded to.
    """
    if momenta.dtype == gradients.dtype:
        updated = momenta.mul_(momentum).add_(gradients)
    else:
        updated = momenta.to(gradients.dtype).mul_(momentum).add_(gradients)
        momenta.copy_(updated)
    return gradients.add(updated, alpha=momentum) if nesterov else updated


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonRule(UpdateRule):
    """U = NewtonSchulz(mu M + G), scaled by sqrt(d_out/d_in).

    Attributes:
        momentum: mu.
        nesterov: orthogonalize mu M + G rather than M.
        orthogonalizer: Newton-Schulz.
        momentum_dtype: in which M is kept.
        fade: on the sphere, let steps fade as M does while the gradient is exactly zero.
    """

    name: ClassVar[str] = "muon"
    needs_matrix: ClassVar[bool] = True

    momentum: float = 0.95
    nesterov: bool = True
    orthogonalizer: NewtonSchulz = field(default_factory=NewtonSchulz)
    momentum_dtype: torch.dtype = torch.float32
    fade: bool = True

    @classmethod
    def of(cls, options: HyperPConfig, family: str) -> Self:
        """Return the rule for a run's options."""
        return cls(
            momentum=options.momentum,
            nesterov=options.nesterov,
            orthogonalizer=options.newton_schulz(family),
            momentum_dtype=options.momentum_dtype,
            fade=options.zero_gradients == "fade",
        )

    @property
    def newton_schulz(self) -> NewtonSchulz:
        """What the rule orthogonalizes with."""
        return self.orthogonalizer

    def state_entries(self) -> Mapping[str, StateEntry]:
        """Return the momentum."""
        return {"momentum_buffer": StateEntry(dtype=self.momentum_dtype)}

    def fading(self) -> tuple[str, float] | None:
        """Return the momentum and mu."""
        return ("momentum_buffer", self.momentum) if self.fade else None

    def direction_(self, gradients: torch.Tensor, state: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
        """Update the momentum and return it orthogonalized."""
        momenta = state["momentum_buffer"]
        update = momentum_(momenta, gradients, momentum=self.momentum, nesterov=self.nesterov)
        return part.orthogonalize(update, self.orthogonalizer)

    def scale(self, rows: int, columns: int) -> float:
        """Return sqrt(d_out/d_in)."""
        return math.sqrt(rows / columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonHRule(MuonRule):
    """Muon's direction on the sphere; the step is a fraction of the radius, so no scale of its own matters."""

    name: ClassVar[str] = "muonh"
    on_sphere: ClassVar[bool] = True
