"""The mixture-of-experts block: Megatron-Core's MoELayer with SqrtGate and a variance-preserving shared expert."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from megatron_hyperp.megatron_compat.experts import MoELayer, grouped_experts
from megatron_hyperp.megatron_compat.specs import submodules_of, with_module
from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.moe.grouped import GroupedLinear
from megatron_hyperp.moe.sqrt_gate import SqrtGateRouter


class HyperPMoELayer(MoELayer):  # type: ignore[misc]  # Megatron-Core has no types
    """Routed and shared experts mixed as sqrt(1/2) each, which keeps the variance of one (arXiv 2603.28743)."""

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """Combine the routed experts' sum with the shared expert's output, [sequence, batch, hidden] each."""
        routed = super().postprocess(output, None)
        if shared_expert_output is None:
            return routed
        return math.sqrt(0.5) * (routed + shared_expert_output)


def with_sqrt_gate(spec: Any, *, gate: str, balance: Balance, grouped_here: bool) -> Any:
    """Turn Megatron-Core's spec of a mixture-of-experts block into ours; its parts are changed in place.

    Args:
        spec: of a ``MoELayer``.
        gate: "sqrt" or "softmax".
        balance: shared by all layers.
        grouped_here: multiply experts by PyTorch's grouped product; otherwise they stay the spec's.
    """
    parts = submodules_of(spec)
    if grouped_here:
        parts.experts = grouped_experts(GroupedLinear, fc1={"split": 0}, fc2={"split": 1})
    parts.router = partial(SqrtGateRouter, gate=gate, balance=balance)
    return with_module(spec, HyperPMoELayer)
