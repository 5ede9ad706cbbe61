"""AdamH: Adam's direction on the hypersphere (arXiv 2603.28743), for matrices that one rank holds whole."""

from __future__ import annotations

from typing import Any

import torch

from megatron_hyperp.optim.rules.adam import AdamHRule
from megatron_hyperp.optim.sphere import SphereOptimizer, adamh_radius


class AdamH(SphereOptimizer):
    """Adam's direction, then MuonH's scaling to the radius and retraction onto the sphere.

    Args:
        params: matrices [d_out, d_in], or groups of them.
        lr: step as a fraction of the radius.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        init_std: standard deviation of the initial weights, which fixes the stateless radius.
        radius: "stateless" (init_std sqrt(d_out d_in)), "from-weights" or a number.
        weight_decay: lambda; a first-order no-op on the sphere.

    Raises:
        ValueError: a parameter is not 2-D, or a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        init_std: float = 0.02,
        radius: str | float = "stateless",
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be at least 0 and below 1")
        if not eps > 0 or not init_std > 0:
            raise ValueError(f"eps is {eps} and init_std {init_std}; both must be greater than 0")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "init_std": init_std, "weight_decay": weight_decay}
        super().__init__(params, defaults, radius)

    def stateless_radius(self, parameter: torch.Tensor, group: dict[str, Any]) -> float:
        """Return init_std sqrt(d_out d_in)."""
        return adamh_radius(parameter.shape[0], parameter.shape[1], group["init_std"])

    def rule(self, group: dict[str, Any]) -> AdamHRule:
        """Return the rule that a group's hyperparameters make."""
        return AdamHRule(betas=group["betas"], eps=group["eps"])
