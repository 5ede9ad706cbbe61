"""Layer specs: Megatron-Core's own, with our residual scaling and a norm that allows sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.model.attention import SdpaAttention
from megatron_hyperp.model.depth_mup import scaled_bias_dropout_add
from megatron_hyperp.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.moe.layer import with_sqrt_gate


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for the local spec; Megatron-Core's wrapper around torch's refuses sequence parallelism.

    Args:
        config: of the model; with sequence parallelism each rank sees a part of the tokens, so the gain is marked for
            Megatron-Core to sum its gradient over the tensor-parallel ranks.
        hidden_size: size of the last dimension of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (an attribute that Tensor lacks)


def local_block_spec(
    config: TransformerConfig,
    *,
    residual_multiplier: float,
    vp_stage: int | None = None,
    gate: str = "sqrt",
    balance: Balance | None = None,
    fp8: bool = False,
    sdpa: bool = False,
) -> TransformerBlockSubmodules:
    """Return the spec of one pipeline chunk in Megatron-Core's local (plain PyTorch) layers.

    Args:
        config: of the model.
        residual_multiplier: factor on attention and MLP outputs.
        vp_stage: index of the chunk under the interleaved schedule.
        gate: of the router, in a mixture of experts.
        balance: statistics that all routers share; None for a dense model.
        fp8: whether linear layers can emulate it.
        sdpa: whether core attention is torch's fused kernel.
    """
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    block = copy.deepcopy(block)
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        parts.self_attn_bda = parts.mlp_bda = scaled_bias_dropout_add(residual_multiplier)
        if balance is not None:
            parts.mlp = with_sqrt_gate(parts.mlp, gate=gate, balance=balance)
        if config.qk_layernorm:
            attention = parts.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if sdpa:
            parts.self_attention.submodules.core_attention = SdpaAttention
        if fp8:
            _use_fp8_layers(parts)
    return block


def _use_fp8_layers(parts: Any) -> None:
    """Put linear layers that can emulate FP8 in the place of Megatron-Core's; grouped experts can as they are."""
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = Fp8ColumnParallelLinear, Fp8RowParallelLinear
    mlp = parts.mlp.submodules
    dense = mlp.shared_experts.submodules if hasattr(mlp, "shared_experts") else mlp
    dense.linear_fc1, dense.linear_fc2 = Fp8ColumnParallelLinear, Fp8RowParallelLinear
