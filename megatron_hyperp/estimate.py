"""Parameters and FLOPs of a decoder, by the paper's count (arXiv 2603.28743)."""

from __future__ import annotations

from typing import Protocol


class DecoderShape(Protocol):
    """The sizes that the counts depend on; ``megatron_hyperp.config.ModelConfig`` has them once it is resolved."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    seq_length: int
    untie_embeddings_and_output_weights: bool


class ExpertShape(Protocol):
    """The sizes of a mixture of experts; ``megatron_hyperp.config.MoEConfig`` has them once it is resolved."""

    num_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int


def parameter_count(model: DecoderShape, moe: ExpertShape | None = None, *, active: bool = False) -> int:
    """Weights of all matrices, norm gains left out as in the paper.

    With the paper's architecture of depth d this is
    ``12 a^2 d^3 + 2 a d V + 2 a d^2 H h + 2 a d^2 G h`` (a = 128, H = 2d, G = 4, h = 128, V = 32000).

    Args:
        model: sizes of the decoder.
        moe: sizes of its experts; None, or no experts, for a dense model.
        active: count those experts alone that a token passes through. With sparsity S and top-k K of FFN size 4w/K,
            that is the dense count and the router.
    """
    attention = 2 * model.hidden_size * (model.num_attention_heads + model.num_query_groups) * model.kv_channels
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    if moe is not None and moe.num_experts:
        experts = moe.moe_router_topk if active else moe.num_experts
        width = experts * moe.moe_ffn_hidden_size + moe.moe_shared_expert_intermediate_size
        mlp = model.hidden_size * (3 * width + moe.num_experts)
    embeddings = (2 if model.untie_embeddings_and_output_weights else 1) * model.vocab_size * model.hidden_size
    return model.num_layers * (attention + mlp) + embeddings


def train_flops_per_token(model: DecoderShape, moe: ExpertShape | None = None) -> int:
    """Forward and backward FLOPs per token, ``3 (2 N + 4 d H h T_ctx)``: matrices plus attention scores and values.

    N counts the active parameters.
    """
    attention = 4 * model.num_layers * model.num_attention_heads * model.kv_channels * model.seq_length
    return 3 * (2 * parameter_count(model, moe, active=True) + attention)
