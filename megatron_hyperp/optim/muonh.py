"""MuonH: Muon on the hypersphere (arXiv 2603.28743), for matrices that one rank holds whole."""

from __future__ import annotations

from typing import Any

import torch

from megatron_hyperp.optim.orthogonalize import NewtonSchulz, coefficient_schedule
from megatron_hyperp.optim.rules.muon import MuonHRule
from megatron_hyperp.optim.sphere import SphereOptimizer, muonh_radius


class MuonH(SphereOptimizer):
    """Muon whose weights stay on spheres of fixed Frobenius norm, so that one lr serves every width.

    A step is M <- mu M + G; U <- NewtonSchulz(mu M + G); W <- W - lr (R/||U||) U; W <- W (R/||W||). The lr is a
    fraction of the radius. Put weights on their spheres before training (the first step does so otherwise).

    Args:
        params: matrices [d_out, d_in], or groups of them.
        lr: step as a fraction of the radius.
        momentum: mu.
        nesterov: orthogonalize mu M + G rather than M.
        ns_steps: Newton-Schulz steps.
        coefficients: "quintic" or "polar_express".
        ns_dtype: precision of Newton-Schulz.
        radius: "stateless" (sqrt(d_out/3)), "from-weights" or a number.
        weight_decay: lambda; a first-order no-op on the sphere.

    Raises:
        ValueError: a parameter is not 2-D, or a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: str = "quintic",
        ns_dtype: torch.dtype = torch.bfloat16,
        radius: str | float = "stateless",
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        coefficient_schedule(coefficients, ns_steps)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "ns_dtype": ns_dtype,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, radius)

    def stateless_radius(self, parameter: torch.Tensor, group: dict[str, Any]) -> float:
        """Return sqrt(d_out/3)."""
        return muonh_radius(parameter.shape[0])

    def rule(self, group: dict[str, Any]) -> MuonHRule:
        """Return the rule that a group's hyperparameters make."""
        orthogonalizer = NewtonSchulz(
            steps=group["ns_steps"], coefficients=group["coefficients"], dtype=group["ns_dtype"]
        )
        return MuonHRule(momentum=group["momentum"], nesterov=group["nesterov"], orthogonalizer=orthogonalizer)
