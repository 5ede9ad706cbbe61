"""NorMuon (arXiv 2510.05491): Muon with a second moment for each row; and NorMuonH, the same on the hypersphere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_hyperp.optim.rules.base import Part, StateEntry
from megatron_hyperp.optim.rules.muon import MuonRule

# Root mean square of an update's elements at learning rate 1 (arXiv 2510.05491, algorithm 1).
UPDATE_RMS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class NorMuonRule(MuonRule):
    """O = NewtonSchulz(mu M + G); v <- beta2 v + (1 - beta2) mean_columns(O^2); U = O / (sqrt(v) + eps), RMS 0.2.

    A row of a weight [d_out, d_in] is a neuron. The paper's M is an exponential mean and ours a sum, which
    Newton-Schulz, whose result does not depend on the size of its input, cannot tell apart.

    Attributes:
        beta2: decay of the second moment.
        eps: added to its root.
    """

    name: ClassVar[str] = "normuon"

    beta2: float = 0.95
    eps: float = 1e-8

    def state_entries(self) -> Mapping[str, StateEntry]:
        """Return the momentum and a second moment for each row."""
        # A super() without arguments finds no class in a dataclass with slots.
        return {**MuonRule.state_entries(self), "row_exp_avg_sq": StateEntry("rows")}

    def direction_(self, gradients: torch.Tensor, state: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
        """Update momentum and second moment; return the momentum orthogonalized, its rows normalized."""
        update = MuonRule.direction_(self, gradients, state, part)
        squares = part.sum(update.square(), dim=1)
        moment = state["row_exp_avg_sq"].lerp_(squares / part.columns, 1.0 - self.beta2)
        factors = 1.0 / (moment.sqrt() + self.eps)
        norm = part.sum(squares * factors.square(), dim=0).sqrt()
        # A matrix of zeros stays one.
        return update.mul_(factors * (UPDATE_RMS * math.sqrt(part.rows * part.columns) / norm.clamp_min(self.eps)))

    def scale(self, rows: int, columns: int) -> float:
        """Return 1: the update's RMS is set already."""
        del rows, columns
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NorMuonHRule(NorMuonRule):
    """NorMuon's direction on the sphere, where the step is a fraction of the radius."""

    name: ClassVar[str] = "normuonh"
    on_sphere: ClassVar[bool] = True
