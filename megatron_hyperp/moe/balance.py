"""Load balancing over the whole global batch: the switch loss, and how even the load is.

The switch loss of a layer is E sum_i f_i P_i: f_i is the share of all assignments that expert i gets, P_i its mean
router probability, both over every token of the global batch (arXiv 2101.03961, 2501.11873). Its gradient needs f,
which is known only after the last micro-batch. Megatron-Core's ``global_aux_loss`` takes the micro-batches so far, and
so depends on how the batch is cut. Here f is that of the batch before, or, on request, of this batch by a forward pass
ahead of time; either is the same for every layout. Counting needs one all-reduce a step for all layers, none in the
forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.megatron_compat.experts import MoEAuxLossAutoScaler


class Balance:
    """The loads of all layers' experts in the global batch.

    Args:
        layers: of the whole model.
        experts: routed experts of a layer.
        coefficient: weight of the loss; 0 only counts.
    """

    def __init__(self, layers: int, experts: int, coefficient: float) -> None:
        self.experts = experts
        self.coefficient = coefficient
        # Whether forward passes without gradients count: they do when they look ahead, not under evaluation.
        self.looks_ahead = False
        home = device.device()
        # [layers, experts]. Equal shares have no gradient: probabilities sum to 1.
        self.shares = torch.full((layers, experts), 1.0 / experts, dtype=torch.float64, device=home)
        # Assignments and summed probabilities of this rank's tokens; layers of other pipeline stages stay 0.
        self._counted = torch.zeros((2, layers, experts), dtype=torch.float64, device=home)
        self.tokens = torch.zeros_like(self.shares)
        self.loss = torch.zeros(layers, dtype=torch.float64, device=home)
        # Summed squares of the tokens' log-sum-exp, and their mean over the last batch.
        self._squares = torch.zeros_like(self.loss)
        self.router_z = torch.zeros_like(self.loss)

    def attach(
        self, probs: torch.Tensor, logits: torch.Tensor, routing_map: torch.Tensor, *, layer: int
    ) -> torch.Tensor:
        """Count a micro-batch's assignments and return the gates with the loss attached to them.

        Args:
            probs: gates [tokens, experts].
            logits: [tokens, experts].
            routing_map: which experts are chosen, [tokens, experts].
            layer: its number in the whole model, from 0.
        """
        if not torch.is_grad_enabled() and not self.looks_ahead:
            # Evaluation, or the first of the two forward passes of recomputation.
            return probs
        scores = torch.softmax(logits, dim=-1)
        self._counted[0, layer] += routing_map.sum(dim=0)
        self._counted[1, layer] += scores.detach().sum(dim=0, dtype=torch.float64)
        self._squares[layer] += torch.logsumexp(logits.detach(), dim=-1).square().sum(dtype=torch.float64)
        if not self.coefficient or not torch.is_grad_enabled():
            return probs
        # A sum over tokens: finalize_model_grads divides every gradient by the number of tokens in the global batch.
        weights = (self.coefficient * self.experts * self.shares[layer]).to(scores.dtype)
        return MoEAuxLossAutoScaler.apply(probs, (scores.sum(dim=0) * weights).sum())

    def finish(self) -> None:
        """Sum what was counted since the last call over all ranks; a collective call.

        Then ``tokens`` [layers, experts] holds assignments, ``loss`` [layers] the switch loss of the batch, without its
        coefficient, ``router_z`` [layers] the mean squared log-sum-exp of the router's logits (what a z-loss keeps
        small), and ``shares`` what the next batch's loss uses.
        """
        # Every token is counted on one rank: tensor-parallel ranks hold different parts of the sequence, or a group
        # has just one; other pipeline stages add zeros.
        summed = torch.cat([self._counted.flatten(), self._squares])
        dist.all_reduce(summed)
        self.tokens, probabilities = summed[: self._counted.numel()].view_as(self._counted).clone()
        # The probabilities of a token sum to 1.
        self.router_z = summed[self._counted.numel() :] / probabilities.sum(dim=1).clamp_min(1.0)
        self._counted.zero_()
        self._squares.zero_()
        total = self.tokens.sum(dim=1, keepdim=True).clamp_min(1.0)
        self.shares = self.tokens / total
        mean = probabilities / probabilities.sum(dim=1, keepdim=True).clamp_min(1e-30)
        self.loss = self.experts * (self.shares * mean).sum(dim=1)

    def metrics(self) -> dict[str, Any]:
        """What a row of metrics says of the last batch: over all layers, and each layer's loads."""
        violations = self.max_violation()
        return {
            "balance_loss": float(self.loss.mean()),
            "router_z": float(self.router_z.mean()),
            "max_vio": float(violations.max()),
            "max_vio_per_layer": violations.tolist(),
            "tokens_per_expert": self.tokens.int().tolist(),
        }

    def max_violation(self) -> torch.Tensor:
        """MaxVio of each layer: (largest load - mean load) / mean load, [layers]."""
        mean = self.tokens.mean(dim=1).clamp_min(1e-30)
        return self.tokens.amax(dim=1) / mean - 1.0

    def state(self) -> torch.Tensor:
        """What a checkpoint keeps: the shares, on the CPU."""
        return self.shares.cpu()

    def load(self, state: torch.Tensor) -> None:
        """Take over the shares of a checkpoint."""
        self.shares = state.to(self.shares)
