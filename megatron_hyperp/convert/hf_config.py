"""Hugging Face's config.json, from our config and to it; what the other side lacks is refused by name."""

from __future__ import annotations

import typing
from typing import Any

from megatron_hyperp.arguments import convert, shown
from megatron_hyperp.config import Config, MoEConfig
from megatron_hyperp.errors import UsageError
from megatron_hyperp.resolve import fill_dense

QWEN3, LLAMA, OURS = "Qwen3ForCausalLM", "LlamaForCausalLM", "HyperPForCausalLM"
MODEL_TYPES = {QWEN3: "qwen3", LLAMA: "llama", OURS: "hyperp"}
CODE_FILE = "modeling_hyperp.py"
# Fields of config.json by name, with the values that our model can express; absent is the first of them.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    # Two names of one function in transformers' ACT2FN.
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
# What an absent key of config.json stands for: the defaults of the config classes in transformers 5.23.0 (their rotary
# base is 10000, and embeddings are not tied). A head size that is missing here follows from the width and the heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    QWEN3: {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
    LLAMA: {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    OURS: {},
}


# Sizes that every config.json has.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
}


def architecture(config: Config) -> str:
    """Return the class of transformers that a model of ours is exported as.

    A dense model is a Qwen3 with norms on queries and keys and a Llama without; a mixture of experts, with its gates
    and the mix of its shared expert, is a class of our own.
    """
    if config.moe.num_experts:
        return OURS
    return QWEN3 if config.model.qk_layernorm else LLAMA


def to_json(config: Config, *, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: resolved.
        dtype: of the weights, by torch's name.
        bos: id of the token that documents begin with; None if they begin with none.
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
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        # Transformers 4 reads only this one, version 5 only that above.
        "rope_theta": float(model.rotary_base),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": bos,
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
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise UsageError(f"{where} is of the architecture {shown(name)}; those that are read: {', '.join(MODEL_TYPES)}")
    _check(content, where)
    content = {**_DEFAULTS[name], **content}
    config = Config()
    model = config.model
    for field, key in _SIZES.items():
        setattr(model, field, _read(content, key, int, where))
    model.unpadded_vocab_size = model.vocab_size
    model.num_query_groups = _read(content, "num_key_value_heads", int, where, model.num_attention_heads)
    head = model.hidden_size // model.num_attention_heads
    model.kv_channels = _read(content, "head_dim", int, where, head)
    model.norm_epsilon = _read(content, "rms_norm_eps", float, where)
    model.rotary_base = _rotary_base(content, where)
    model.max_position_embeddings = _read(content, "max_position_embeddings", int, where, model.seq_length)
    model.seq_length = min(model.seq_length, model.max_position_embeddings)
    model.untie_embeddings_and_output_weights = not _read(content, "tie_word_embeddings", bool, where, False)
    model.qk_layernorm = name == QWEN3
    model.softmax_scale, model.residual_multiplier, model.logits_multiplier = model.kv_channels**-0.5, 1.0, 1.0
    if name == OURS:
        _read_own_fields(config, content, where)
    else:
        fill_dense(config.moe)
    return config


def _read(content: dict[str, Any], key: str, kind: Any, where: str, otherwise: Any = None) -> Any:
    """Return a value of the type that it must have, numbers above 0; ``otherwise`` if it is not there.

    Raises:
        UsageError: it is not there and must be, or is something else.
    """
    value = content.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if value is None:
        raise UsageError(f"{where} lacks {key}; take another copy")
    found = convert(value, kind, f"{where}: {key}")
    if kind in (int, float) and not found > 0:
        raise UsageError(f"{where} has {key} {found}; it must be above 0: take another copy")
    return found


def _check(content: dict[str, Any], where: str) -> None:
    """Refuse what our model has not."""
    for name, allowed in _ONLY.items():
        value = content.get(name)
        if value not in allowed and value is not None:
            raise UsageError(
                f"{where} has {name} {shown(value)}; a model here has {allowed[0]}, so that it cannot be imported"
            )


def _rotary_base(content: dict[str, Any], where: str) -> int:
    """The base of plain rotary embeddings; older files keep it at the top."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UsageError(f"{where} has rotary embeddings {shown(rope)}; they must map names to values")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(
            f"{where} has rotary embeddings of the type {shown(kind)}; a model here has default ones alone"
        )
    base: int = _read({**content, **rope}, "rope_theta", int, where, 10000)
    return base


def _read_own_fields(config: Config, content: dict[str, Any], where: str) -> None:
    model, moe = config.model, config.moe
    model.qk_layernorm = _read(content, "qk_layernorm", bool, where)
    for name in ("softmax_scale", "residual_multiplier", "logits_multiplier"):
        setattr(model, name, _read(content, name, float, where))
    moe.num_experts = _read(content, "num_experts", int, where)
    moe.moe_router_topk = _read(content, "num_experts_per_tok", int, where)
    moe.moe_ffn_hidden_size = _read(content, "moe_intermediate_size", int, where)
    shared = content.get("shared_expert_intermediate_size")
    moe.moe_shared_expert_intermediate_size = convert(shared or 0, int, f"{where}: shared_expert_intermediate_size")
    moe.moe_gate = convert(content.get("gate"), typing.get_type_hints(MoEConfig)["moe_gate"], f"{where}: gate")
