"""Hugging Face's config.json, from our config and to it; what the other side lacks is refused by name."""

from __future__ import annotations

from typing import Any

from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError

QWEN3, LLAMA, OURS = "Qwen3ForCausalLM", "LlamaForCausalLM", "HyperPForCausalLM"
MODEL_TYPES = {QWEN3: "qwen3", LLAMA: "llama", OURS: "hyperp"}
CODE_FILE = "modeling_hyperp.py"
# Head size of a Qwen3 whose config.json does not say.
_QWEN3_HEAD = 128
# Fields of config.json by name, with the only value that our model can express.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def architecture(config: Config) -> str:
    """Return the class of transformers that a model of ours is exported as.

    A dense model is a Qwen3 with norms on queries and keys and a Llama without; a mixture of experts, with its gates
    and the mix of its shared expert, is a class of our own.
    """
    if config.moe.num_experts:
        return OURS
    return QWEN3 if config.model.qk_layernorm else LLAMA


def to_json(config: Config, *, dtype: str, eos: int | None) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: resolved.
        dtype: of the weights, by torch's name.
        eos: id of the end-of-document token; None if there is no tokenizer.
    """
    model, name = config.model, architecture(config)
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": MODEL_TYPES[name],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": eos,
        "dtype": dtype,
    }
    if name == OURS:
        content |= _own_fields(config)
    return content


def _own_fields(config: Config) -> dict[str, Any]:
    model, moe = config.model, config.moe
    stem = CODE_FILE.removesuffix(".py")
    return {
        "auto_map": {"AutoConfig": f"{stem}.HyperPConfig", "AutoModelForCausalLM": f"{stem}.{OURS}"},
        "qk_layernorm": model.qk_layernorm,
        "softmax_scale": model.softmax_scale,
        "residual_multiplier": model.residual_multiplier,
        "logits_multiplier": model.logits_multiplier,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_intermediate_size": moe.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "gate": moe.moe_gate,
    }


def from_json(content: dict[str, Any], where: str) -> Config:
    """Return our config of a model of transformers, its multipliers those of a plain transformer.

    Raises:
        UsageError: an architecture or a setting that ours cannot express; it is named.
    """
    names = content.get("architectures") or ["none"]
    if names[0] not in MODEL_TYPES:
        raise UsageError(f"{where} is of the architecture {names[0]}; those that are read: {', '.join(MODEL_TYPES)}")
    _check(content, where)
    config = Config()
    model = config.model
    try:
        model.vocab_size, model.hidden_size = content["vocab_size"], content["hidden_size"]
        model.num_layers, model.ffn_hidden_size = content["num_hidden_layers"], content["intermediate_size"]
        model.num_attention_heads = content["num_attention_heads"]
        model.num_query_groups = content.get("num_key_value_heads") or model.num_attention_heads
        head = _QWEN3_HEAD if names[0] == QWEN3 else model.hidden_size // model.num_attention_heads
        model.kv_channels = content.get("head_dim") or head
        model.norm_epsilon = float(content["rms_norm_eps"])
        model.rotary_base = _rotary_base(content, where)
    except KeyError as error:
        raise UsageError(f"{where} lacks {error.args[0]}; take another copy") from error
    model.seq_length = min(model.seq_length, content.get("max_position_embeddings", model.seq_length))
    model.untie_embeddings_and_output_weights = not content.get("tie_word_embeddings", False)
    model.qk_layernorm = names[0] == QWEN3
    model.softmax_scale, model.residual_multiplier, model.logits_multiplier = model.kv_channels**-0.5, 1.0, 1.0
    if names[0] == OURS:
        _read_own_fields(config, content)
    return config


def _check(content: dict[str, Any], where: str) -> None:
    """Refuse what our model has not."""
    for name, only in _ONLY.items():
        value = content.get(name, only)
        if value != only and value is not None:
            raise UsageError(f"{where} has {name} {value}; a model here has {only}, so that it cannot be imported")


def _rotary_base(content: dict[str, Any], where: str) -> int:
    """The base of plain rotary embeddings; older files keep it at the top."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(f"{where} has rotary embeddings of the type {kind}; a model here has default ones alone")
    base = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    if base != int(base):
        raise UsageError(f"{where} has rope_theta {base}; it must be a whole number here")
    return int(base)


def _read_own_fields(config: Config, content: dict[str, Any]) -> None:
    model, moe = config.model, config.moe
    for name in ("qk_layernorm", "softmax_scale", "residual_multiplier", "logits_multiplier"):
        setattr(model, name, content[name])
    moe.num_experts, moe.moe_router_topk = content["num_experts"], content["num_experts_per_tok"]
    moe.moe_ffn_hidden_size = content["moe_intermediate_size"]
    moe.moe_shared_expert_intermediate_size = content["shared_expert_intermediate_size"]
    moe.moe_gate = content["gate"]
