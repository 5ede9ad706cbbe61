"""Fused attention."""

from __future__ import annotations

from typing import Any

import torch


class DotProductAttention(torch.nn.Module):
    """Causal attention; query [sequence, batch, heads, size], key and value with fewer heads."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        softmax_scale: float | None = None,
        attn_mask_type: str = "causal",
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == "causal"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: str = "causal",
        **_: Any,
    ) -> torch.Tensor:
        """Return [sequence, batch, heads x size]."""
        assert attn_mask_type == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return y.permute(2, 0, 1, 3).flatten(2)
