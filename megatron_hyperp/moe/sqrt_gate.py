"""SqrtGate: gates are square roots of probabilities, so that the output's RMS does not depend on top-k.

With gates g_i = sqrt(p_i), sum g_i^2 = 1: the variance of a sum of uncorrelated expert outputs is that of one expert,
whatever their number. Softmax gates, whose plain sum is 1, let it fall as 1/k (arXiv 2603.28743, SqrtGate).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.megatron_compat.experts import MoEAuxLossAutoScaler, Router
from megatron_hyperp.moe.balance import Balance

# The power of the probability that a gate is.
POWERS = {"sqrt": 0.5, "softmax": 1.0}


def sqrt_gate(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square roots of the softmax over each token's largest logits, and which experts those are.

    Args:
        logits: [tokens, experts].
        topk: experts per token.

    Returns:
        Gates [tokens, topk], largest first, whose squares sum to 1; indices [tokens, topk].

    Raises:
        ValueError: ``topk`` is not between 1 and the number of experts.
    """
    return topk_gates(logits, topk, POWERS["sqrt"])


def topk_gates(logits: torch.Tensor, topk: int, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`sqrt_gate`, with any power of the probabilities.

    The power is taken of the logarithm: the gradient then has no 1/sqrt(p), which is infinite where p underflows.
    """
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"topk is {topk}; it must be from 1 to the number of experts, {logits.shape[-1]}")
    largest, indices = torch.topk(logits, topk, dim=-1)
    return torch.exp(power * torch.log_softmax(largest, dim=-1)), indices


class SqrtGateRouter(Router):
    """Megatron-Core's top-k router with another gate, and a load-balancing loss over the whole global batch.

    Args:
        config: of the model; its load-balancing type is one of Megatron-Core's, or "none" with ``balance``.
        pg_collection: Megatron-Core's process groups.
        gate: a key of :data:`POWERS`.
        balance: statistics of the global batch for the global loss; None without that loss.
        more: what the block passes besides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        *,
        gate: str = "sqrt",
        balance: Balance,
        **more: Any,
    ) -> None:
        super().__init__(config, pg_collection, **more)
        self.power = POWERS[gate]
        self.balance = balance

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts and gates.

        Args:
            logits: [sequence, batch, experts], fp32.
            padding_mask: not used by this trainer, must be None.

        Returns:
            Gates [tokens, experts], zero where an expert is not chosen, and whether it is [tokens, experts].
        """
        assert padding_mask is None
        sequence, batch = logits.shape[:2]
        logits = self.apply_z_loss(logits.reshape(-1, self.num_experts))
        gates, indices = topk_gates(logits, self.topk, self.power)
        probs = torch.zeros_like(logits).scatter(1, indices, gates)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
        # The losses count what the router asked for, before any token is dropped.
        probs = self._balanced(probs, logits, routing_map, sequence, batch)
        return self.with_capacity(probs, routing_map)

    def _balanced(
        self, probs: torch.Tensor, logits: torch.Tensor, routing_map: torch.Tensor, sequence: int, batch: int
    ) -> torch.Tensor:
        """Attach the load-balancing loss to the gates, so that the backward pass reaches it."""
        if not self.training:
            return probs
        probs = self.balance.attach(probs, logits, routing_map, layer=self.layer_number - 1)
        return self.with_losses(probs, logits, sequence, batch)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the mean over tokens of the squared log-sum-exp (arXiv 2202.08906) to the logits.

        Megatron-Core's falls with the number of tensor-parallel ranks where the loss is one per token.
        """
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        # A sum over tokens, as in Balance.attach.
        return MoEAuxLossAutoScaler.apply(logits, coefficient * torch.logsumexp(logits, dim=-1).square().sum())

    def attach_loss(self, probs: torch.Tensor, loss: torch.Tensor, group: Any) -> torch.Tensor:
        """Attach one of Megatron-Core's losses to the gates: a mean over the group, of which a rank has its part.

        Times all tokens of the group. Megatron-Core takes those of the rank, or, for the loss per sequence, of one
        sequence, so that its losses fall with the number of tensor-parallel ranks and with the micro-batch size.
        """
        return MoEAuxLossAutoScaler.apply(probs, loss * (probs.shape[0] * group.size()))
