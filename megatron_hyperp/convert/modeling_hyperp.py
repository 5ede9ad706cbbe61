"""A mixture of experts trained with HyperP, for transformers: SqrtGate, and a shared expert mixed in equal variance.

This file comes with the checkpoint and needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Attention, norms and rotary embeddings are Qwen3's. Residual branches are multiplied by ``residual_multiplier``,
attention logits by ``softmax_scale``. Source: arXiv 2603.28743.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

# The power of a probability that a gate is.
POWERS = {"sqrt": 0.5, "softmax": 1.0}


class HyperPConfig(Qwen3Config):
    """Qwen3's settings, with those of experts and the multipliers.

    Attributes:
        qk_layernorm: RMSNorm on queries and keys.
        softmax_scale: factor on attention logits.
        residual_multiplier: factor on the outputs of attention and experts.
        logits_multiplier: factor on the output layer's input.
        num_experts: routed experts of a layer.
        num_experts_per_tok: of which a token visits so many.
        moe_intermediate_size: FFN size of each.
        shared_expert_intermediate_size: FFN size of the expert that every token visits; 0 for none.
        gate: "sqrt" or "softmax" of the logits of the chosen experts.
    """

    model_type = "hyperp"

    qk_layernorm: bool = True
    softmax_scale: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    gate: str = "sqrt"


class HyperPAttention(Qwen3Attention):
    """Qwen3's attention with another scale, and norms only if the model has them."""

    def __init__(self, config: HyperPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = config.softmax_scale
        if not config.qk_layernorm:
            self.q_norm = nn.Identity()  # type: ignore[assignment]
            self.k_norm = nn.Identity()  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the branch times the residual multiplier, and the attention weights."""
        output, weights = super().forward(*args, **kwargs)
        return output * self.config.residual_multiplier, weights


class HyperPMLP(Qwen3MLP):
    """SwiGLU of another size."""

    def __init__(self, config: HyperPConfig, size: int) -> None:
        super().__init__(config)
        self.intermediate_size = size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)


class HyperPExperts(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, config: HyperPConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(HyperPMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        shared = config.shared_expert_intermediate_size
        self.shared_expert = HyperPMLP(config, shared) if shared else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the mix of experts times the residual multiplier; ``hidden`` is [batch, tokens, width]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = nn.functional.linear(tokens.float(), self.gate.weight.float())
        largest, chosen = logits.topk(self.config.num_experts_per_tok, dim=-1)
        gates = torch.exp(POWERS[self.config.gate] * torch.log_softmax(largest, dim=-1)).to(tokens.dtype)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                output.index_add_(0, rows, expert(tokens[rows]) * gates[rows, places, None])
        if self.shared_expert is not None:
            output = math.sqrt(0.5) * (output + self.shared_expert(tokens))
        return output.view_as(hidden) * self.config.residual_multiplier


class HyperPDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with these parts."""

    def __init__(self, config: HyperPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = HyperPAttention(config, layer_idx)
        self.mlp = HyperPExperts(config)  # type: ignore[assignment]


class HyperPModel(Qwen3Model):
    """Qwen3's model with these layers."""

    config_class = HyperPConfig

    def __init__(self, config: HyperPConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(HyperPDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return as Qwen3's, the last hidden state times the logits multiplier."""
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * self.config.logits_multiplier
        return outputs


class HyperPForCausalLM(Qwen3ForCausalLM):
    """Qwen3's language model with this model."""

    config_class = HyperPConfig
    config: HyperPConfig

    def __init__(self, config: HyperPConfig) -> None:
        super().__init__(config)
        self.model = HyperPModel(config)
        self.post_init()
