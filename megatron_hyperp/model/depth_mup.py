"""Depth-muP: every attention and MLP output is scaled before it joins the residual stream (arXiv 2603.28743)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], BiasDropoutAdd]:
    """Return a ``bias_dropout_add`` for a layer spec that computes residual + dropout(multiplier (x + bias)).

    Args:
        multiplier: the residual multiplier, 1/sqrt(2L) under Depth-muP.
    """
    if multiplier == 1.0:
        return get_bias_dropout_add

    def build(training: bool, fused: bool) -> BiasDropoutAdd:
        add = get_bias_dropout_add(training, fused)

        def scaled(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            return add((x * multiplier, None if bias is None else bias * multiplier), residual, dropout)

        return scaled

    return build
