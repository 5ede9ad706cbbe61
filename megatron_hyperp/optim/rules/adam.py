"""AdamW (arXiv 1412.6980, 1711.05101), and AdamH, Adam's direction on the hypersphere (arXiv 2603.28743)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from megatron_hyperp.optim.rules.base import Part, StateEntry, UpdateRule

if TYPE_CHECKING:
    from megatron_hyperp.optim.options import HyperPConfig


def adam_direction_(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradients: torch.Tensor,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.Tensor:
    """Update both moments in place and return m^/(sqrt(v^) + eps), bias-corrected (Adam, arXiv 1412.6980).

    Args:
        exp_avg: first moment, fp32, any shape.
        exp_avg_sq: second moment, the same shape.
        gradients: the same shape.
        step: number of this step, from 1.
        betas: decays of the moments.
        eps: added to the root.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(gradients, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    return exp_avg.div(root).div_(1.0 - beta1**step)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWRule(UpdateRule):
    """Adam's direction, elementwise.

    Attributes:
        betas: decays of the moments.
        eps: added to the root of the second moment.
        fade: on the sphere, let steps fade as the first moment does while the gradient is exactly zero.
    """

    name: ClassVar[str] = "adamw"

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fade: bool = True

    @classmethod
    def of(cls, options: HyperPConfig, family: str) -> Self:
        """Return the rule for a run's options."""
        del family
        return cls(betas=options.adam_betas, eps=options.adam_eps, fade=options.zero_gradients == "fade")

    def state_entries(self) -> Mapping[str, StateEntry]:
        """Return both moments."""
        return {"exp_avg": StateEntry(), "exp_avg_sq": StateEntry()}

    def fading(self) -> tuple[str, float] | None:
        """Return the first moment and its decay."""
        return ("exp_avg", self.betas[0]) if self.fade else None

    def direction_(self, gradients: torch.Tensor, state: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
        """Update the moments and return Adam's direction."""
        return adam_direction_(
            state["exp_avg"], state["exp_avg_sq"], gradients, step=part.step, betas=self.betas, eps=self.eps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamHRule(AdamWRule):
    """Adam's direction on the sphere, for the output layer."""

    name: ClassVar[str] = "adamh"
    on_sphere: ClassVar[bool] = True
