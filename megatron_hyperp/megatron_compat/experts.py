"""A mixture of experts in Megatron-Core: the block, the router's hooks, and a rank's experts as one module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from megatron_hyperp.megatron_compat.versions import megatron_core_version

__all__ = ["MoEAuxLossAutoScaler", "MoELayer", "Router", "grouped_experts"]


class Router(TopKRouter):  # type: ignore[misc]  # Megatron-Core has no types
    """Megatron-Core's top-k router; where it attaches a loss to the gates, it asks :meth:`attach_loss`.

    Args:
        config: of the model.
        pg_collection: Megatron-Core's process groups.
        more: what the block passes besides: ``is_mtp_layer`` from 0.17 on.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **more: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **more)

    def with_losses(self, probs: torch.Tensor, logits: torch.Tensor, sequence: int, batch: int) -> torch.Tensor:
        """Return the gates [tokens, experts] with Megatron-Core's load-balancing losses attached, if it has any.

        Args:
            probs: gates [tokens, experts].
            logits: [tokens, experts].
            sequence: positions of this rank.
            batch: sequences of this micro-batch.
        """
        if not torch.is_grad_enabled() or not self.is_aux_loss_enabled():
            return probs
        chosen, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        probs = self._apply_aux_loss(probs, scores, chosen)
        probs = self._apply_seq_aux_loss(probs, scores, chosen, sequence, batch)
        return self._apply_global_aux_loss(probs, scores, chosen)

    def attach_loss(self, probs: torch.Tensor, loss: torch.Tensor, group: Any) -> torch.Tensor:
        """Return the gates [tokens, experts] with a loss attached, a scalar with its coefficient.

        Args:
            probs: gates [tokens, experts].
            loss: this rank's part of a mean over the group.
            group: ranks over which the loss is summed.
        """
        raise NotImplementedError

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        **_: Any,
    ) -> torch.Tensor:
        """Attach a loss without logging it: Megatron-Core's log would grow, and nothing here reads it.

        What else is passed says how to log: ``reduce_group_has_dp`` before 0.18, then its opposite
        ``needs_dp_avg``, and the number of tokens.
        """
        return self.attach_loss(activation, aux_loss, reduce_group)

    def with_capacity(self, probs: torch.Tensor, routing_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop the assignments that exceed an expert's capacity from gates and choices, [tokens, experts] each."""
        config = self.config
        if config.moe_expert_capacity_factor is None:
            return probs, routing_map
        dropped: tuple[torch.Tensor, torch.Tensor] = apply_router_token_dropping(
            probs,
            routing_map,
            router_topk=self.topk,
            capacity_factor=config.moe_expert_capacity_factor,
            drop_policy=config.moe_token_drop_policy,
            pad_to_capacity=config.moe_pad_expert_input_to_capacity,
        )
        return dropped


def grouped_experts(linear: type, fc1: dict[str, Any], fc2: dict[str, Any]) -> Any:
    """Return the spec of a rank's experts: ``TEGroupedMLP`` on other layers than TransformerEngine's.

    Args:
        linear: class of both layers, with TransformerEngine's ``GroupedLinear`` interface.
        fc1: keyword arguments of the first, besides those that ``TEGroupedMLP`` passes.
        fc2: of the second.
    """
    if megatron_core_version < Version("0.17"):
        from megatron.core.transformer.mlp import MLPSubmodules

        first, second = ModuleSpec(linear, params=fc1), ModuleSpec(linear, params=fc2)
        return ModuleSpec(experts.TEGroupedMLP, submodules=MLPSubmodules(linear_fc1=first, linear_fc2=second))
    submodules = experts.GroupedMLPSubmodules(linear_fc1=partial(linear, **fc1), linear_fc2=partial(linear, **fc2))
    return partial(experts.TEGroupedMLP, submodules=submodules)
