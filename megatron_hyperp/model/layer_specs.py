"""Layer specs: Megatron-Core's own, with our residual scaling and a norm that allows sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.megatron_compat.specs import decoder_block_spec, submodules_of
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


def block_spec(
    config: TransformerConfig,
    *,
    implementation: str,
    residual_multiplier: float,
    vp_stage: int | None = None,
    gate: str = "sqrt",
    balance: Balance | None = None,
    attention: str = "local",
    emulates_fp8: bool = False,
) -> TransformerBlockSubmodules:
    """Return the spec of one pipeline chunk.

    Either implementation has the same parameters, under the same keys in checkpoints: each loads the other's.

    Args:
        config: of the model.
        implementation: "local" (Megatron-Core's plain PyTorch layers) or "transformer_engine" (norms fused with the
            linear layers behind them, fused attention, grouped experts, FP8).
        residual_multiplier: factor on attention and MLP outputs.
        vp_stage: index of the chunk under the interleaved schedule.
        gate: of the router, in a mixture of experts.
        balance: statistics that all routers share; None for a dense model.
        attention: "local" (Megatron-Core's, unfused), "sdpa" (torch's fused kernel) or "transformer_engine".
        emulates_fp8: whether linear layers can emulate FP8, "local" alone.
    """
    local = implementation == "local"
    block = decoder_block_spec(config, use_transformer_engine=not local, normalization="RMSNorm", vp_stage=vp_stage)
    block = copy.deepcopy(block)
    if local:
        block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.self_attn_bda = parts.mlp_bda = scaled_bias_dropout_add(residual_multiplier)
        if balance is not None:
            parts.mlp = with_sqrt_gate(parts.mlp, gate=gate, balance=balance, grouped_here=local)
            # Megatron-Core's local spec names this norm so, its TransformerEngine spec only where no router follows.
            parts.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        if local:
            _use_local_norms(parts, qk=config.qk_layernorm)
        if attention != "transformer_engine":
            core = SdpaAttention if attention == "sdpa" else DotProductAttention
            parts.self_attention.submodules.core_attention = core
        if emulates_fp8:
            _use_fp8_layers(parts)
    return block


def _use_local_norms(parts: Any, *, qk: bool) -> None:
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if qk:
        attention = parts.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm


def _use_fp8_layers(parts: Any) -> None:
    """Put linear layers that can emulate FP8 in the place of Megatron-Core's; grouped experts can as they are."""
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = Fp8ColumnParallelLinear, Fp8RowParallelLinear
    mlp = submodules_of(parts.mlp)
    dense = submodules_of(mlp.shared_experts) if hasattr(mlp, "shared_experts") else mlp
    dense.linear_fc1, dense.linear_fc2 = Fp8ColumnParallelLinear, Fp8RowParallelLinear
