"""Megatron-LM's arguments and our config: what one makes of the other, and what a model here cannot have.

Names are those of its ``args``, which its checkpoints have in their common state.
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/arguments.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from megatron_hyperp.arguments import shown
from megatron_hyperp.config import Config
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.resolve import fill_dense

# Of the extra states that layers of TransformerEngine ask for, an export has none: log_all reports them, and goes on.
_FLAGS = "--use-checkpoint-args --no-load-optim --no-load-rng --dist-ckpt-strictness log_all"
# Arguments, with the only value that our model can express.
_ONLY: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "rope_type": "rope",
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_mup": False,
    "apply_query_key_layer_scaling": False,
    "multi_latent_attention": False,
    "window_size": None,
    "mtp_num_layers": None,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_token_drop_policy": "probs",
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_shared_expert_gate": False,
}


def from_arguments(given: Mapping[str, Any], where: str) -> Config:
    """Return our config of Megatron-LM's arguments.

    Raises:
        UsageError: a setting that ours cannot express; it is named.
    """
    for name, only in _ONLY.items():
        if given.get(name, only) not in (only, None):
            raise UsageError(f"{where} has {name} {shown(given[name])}; a model here has {only}: it cannot be imported")
    config = Config()
    try:
        _fill(config, given)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where} lacks an argument that a model needs ({error}); take another copy") from error
    return config


def _fill(config: Config, given: Mapping[str, Any]) -> None:
    model, moe = config.model, config.moe

    def number(name: str, otherwise: float) -> Any:
        return otherwise if given.get(name) is None else given[name]

    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        setattr(model, name, int(given[name]))
    grouped = given.get("group_query_attention", False)
    model.num_query_groups = int(given["num_query_groups"]) if grouped else model.num_attention_heads
    model.vocab_size = int(given["padded_vocab_size"])
    model.kv_channels = int(number("kv_channels", model.hidden_size // model.num_attention_heads))
    model.seq_length = int(number("seq_length", model.seq_length))
    model.max_position_embeddings = max(int(number("max_position_embeddings", 0)), model.seq_length)
    # --norm-epsilon has been kept under the name of Megatron-Core's config since 0.16.
    model.norm_epsilon = float(number("layernorm_epsilon", number("norm_epsilon", 1e-5)))
    model.rotary_base = int(number("rotary_base", 10000))
    model.qk_layernorm = bool(given.get("qk_layernorm"))
    model.untie_embeddings_and_output_weights = bool(given.get("untie_embeddings_and_output_weights"))
    model.softmax_scale = float(number("softmax_scale", model.kv_channels**-0.5))
    model.residual_multiplier, model.logits_multiplier = 1.0, 1.0
    if given.get("num_experts"):
        moe.num_experts, moe.moe_gate = int(given["num_experts"]), "softmax"
        moe.moe_router_topk = int(number("moe_router_topk", 2))
        moe.moe_ffn_hidden_size = int(number("moe_ffn_hidden_size", model.ffn_hidden_size))
        moe.moe_shared_expert_intermediate_size = int(number("moe_shared_expert_intermediate_size", 0))
        if given.get("moe_expert_capacity_factor") is not None:
            moe.moe_expert_capacity_factor = float(given["moe_expert_capacity_factor"])
    else:
        fill_dense(moe)


def to_arguments(config: Config, layout: Layout, dtype: torch.dtype) -> argparse.Namespace:
    """Return the arguments that Megatron-LM reads back with ``--use-checkpoint-args``, and those it compares."""
    model, moe = config.model, config.moe
    given = {name: value for name, value in _ONLY.items() if value is not None}
    given |= {
        **{name: getattr(model, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")},
        **{name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "seq_length")},
        **{name: getattr(model, name) for name in ("qk_layernorm", "norm_epsilon", "rotary_base")},
        "layernorm_epsilon": model.norm_epsilon,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "group_query_attention": True,
        "max_position_embeddings": model.positions,
        "padded_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "tokenizer_type": None,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": moe.num_experts or None,
        "moe_router_topk": moe.moe_router_topk or 2,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size or None,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or None,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_random_init": False,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
    }
    return argparse.Namespace(**given)


def flags(config: Config) -> str:
    """Return the flags with which Megatron-LM loads an export: those that it does not take from the checkpoint as well.

    Args:
        config: of the export.
    """
    model, moe = config.model, config.moe
    found = [_FLAGS]
    if model.qk_layernorm:
        found.append("--qk-layernorm")
    if model.norm_epsilon != 1e-5:
        found.append(f"--norm-epsilon {model.norm_epsilon}")
    if moe.num_experts:
        found.append("--moe-router-dtype fp32")
        if moe.moe_expert_capacity_factor is not None:
            found.append(f"--moe-expert-capacity-factor {moe.moe_expert_capacity_factor}")
    return " ".join(found)
