"""An update rule of your own: momentum whose rows are brought to equal size, on the hypersphere.

    python examples/pretrain_gpt.py --optimizer-rule examples/custom_rule.py:RowBalanced ...

It shards over tensor- and data-parallel ranks, is saved, resharded and planned like the built-in rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_hyperp.optim import HyperPConfig, Part, StateEntry, UpdateRule


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBalanced(UpdateRule):
    """M <- mu M + G; v <- beta2 v + (1 - beta2) mean_columns(M^2); U = M / (sqrt(v) + eps)."""

    name: ClassVar[str] = "row-balanced"
    # The step is a fraction of each matrix's radius; the retraction keeps it on its sphere.
    on_sphere: ClassVar[bool] = True
    # The mean goes over a whole row, so a matrix has one owner, or ranks that sum over it together.
    needs_matrix: ClassVar[bool] = True

    momentum: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8

    @classmethod
    def of(cls, options: HyperPConfig, family: str) -> RowBalanced:
        """Take the momentum from the run's options."""
        return cls(momentum=options.momentum)

    def state_entries(self) -> Mapping[str, StateEntry]:
        """A tensor like the weight, and one number for each of its rows."""
        return {"momentum_buffer": StateEntry("matrix"), "row_exp_avg_sq": StateEntry("rows")}

    def direction_(self, gradients: torch.Tensor, state: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
        """Update the state of a stack of matrices [count, rows, columns] in place, and return its directions."""
        momentum = state["momentum_buffer"].mul_(self.momentum).add_(gradients)
        # Over the columns of the whole matrices, wherever they are.
        squares = part.sum(momentum.square(), dim=1) / part.columns
        moment = state["row_exp_avg_sq"].lerp_(squares, 1.0 - self.beta2)
        return momentum / (moment.sqrt() + self.eps)
