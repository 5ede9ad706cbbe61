"""Core attention on torch's ``scaled_dot_product_attention``, in the place of Megatron-Core's DotProductAttention.

The kernel is always a fused one, which keeps the log-sum-exp of each query instead of all probabilities: torch falls
back to an unfused one by itself, so that is switched off.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hyperp import device


class SdpaAttention(torch.nn.Module):
    """Causal attention of the heads that this tensor-parallel rank holds.

    Args:
        config: of the model.
        layer_number: of the layer, from 1.
        attn_mask_type: causal.
        attention_type: self-attention.
        attention_dropout: none.
        softmax_scale: factor on logits; None for 1/sqrt(head size).

    Raises:
        ValueError: another mask, dropout, or a variant of the softmax.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        del layer_number
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for name, value, allowed in (
            ("attention_type", attention_type, "self"),
            ("attention_dropout", dropout, 0.0),
            ("softmax_type", config.softmax_type, "vanilla"),
            ("window_size", config.window_size, None),
            ("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling, False),
            ("context_parallel_size", config.context_parallel_size, 1),
        ):
            if value != allowed:
                raise ValueError(f"{name} is {value}; SdpaAttention has {allowed} alone, take DotProductAttention")
        _check_mask(attn_mask_type)
        self._scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend to this and earlier tokens.

        Args:
            query: [sequence, batch, heads, head size].
            key: [sequence, batch, groups, head size]; each group serves the next heads / groups heads.
            value: like ``key``.
            attention_mask: none.
            attn_mask_type: causal.
            attention_bias: none.
            packed_seq_params: none.

        Returns:
            [sequence, batch, heads x head size].

        Raises:
            ValueError: a mask, a bias, packed sequences, or keys of other tokens than the queries'.
            RuntimeError: torch has no fused kernel for these tensors.
        """
        for name, given in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if given is not None:
                raise ValueError(f"{name} is given; SdpaAttention has none, take DotProductAttention")
        if attn_mask_type is not None:
            _check_mask(attn_mask_type)
        if len(query) != len(key):
            raise ValueError(f"{len(query)} queries and {len(key)} keys; SdpaAttention needs as many")
        kernel = _kernel(query)
        grouped = query.shape[2] != key.shape[2]
        if grouped and kernel is not SDPBackend.FLASH_ATTENTION:
            repeats = query.shape[2] // key.shape[2]
            key, value = (item.repeat_interleave(repeats, dim=2) for item in (key, value))
            grouped = False
        q, k, v = (item.permute(1, 2, 0, 3) for item in (query, key, value))
        with sdpa_kernel(kernel):
            output = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=grouped
            )
        return output.permute(2, 0, 1, 3).flatten(2).contiguous()


def _check_mask(kind: AttnMaskType) -> None:
    if kind != AttnMaskType.causal:
        raise ValueError(f"attn_mask_type is {kind}; SdpaAttention has causal alone, take DotProductAttention")


def _kernel(query: torch.Tensor) -> SDPBackend:
    """The kernel for queries like these: flash, which alone takes grouped keys, but under CUDA has no fp32.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if device.has_cuda() and query.dtype == torch.float32:
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.FLASH_ATTENTION
