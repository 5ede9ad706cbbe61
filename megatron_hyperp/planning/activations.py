"""Bytes that a rank keeps for the backward pass, with Megatron-Core's local layers.

Counted tensor by tensor, as Korthikanti et al. (arXiv 2205.05198) do for the GPT of their day: here with RMSNorm,
grouped queries, QK-norm, SwiGLU and experts. With ``--attention-backend local`` attention is not fused, so its
probabilities, [heads, sequence, sequence], are kept, and dominate long sequences unless they are recomputed.
"""

from __future__ import annotations

from megatron_hyperp import device
from megatron_hyperp.config import Config

FP32 = 4


def activation_bytes(config: Config, stage: int, micro_batches: int) -> int:
    """Return the peak over a step, of all micro-batches that are in flight.

    Args:
        config: resolved.
        stage: pipeline stage.
        micro_batches: of a step, on this rank.
    """
    parallel, mode = config.parallel, config.training.recompute_granularity
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    layers = config.model.num_layers // stages
    in_flight: float = min(stages - stage, micro_batches)
    if virtual > 1:
        # Narayanan et al., arXiv 2104.04473: chunks of later micro-batches start before the first ones end.
        in_flight += (stages - 1) / virtual
    total = in_flight * layers * layer_bytes(config)
    if mode == "full":
        # While a group of layers goes backward all of it is there.
        total += config.training.recompute_num_layers * layer_bytes(config, mode="none")
    elif mode == "selective":
        total += layer_bytes(config, mode="none") - layer_bytes(config)
    if stage == stages - 1:
        total += _head_bytes(config)
    return round(total)


def layer_bytes(config: Config, mode: str | None = None) -> float:
    """Return what one layer keeps of one micro-batch; ``mode`` in place of the config's recomputation."""
    model, parallel = config.model, config.parallel
    mode = mode or config.training.recompute_granularity
    tensor, itemsize, tokens = parallel.tensor_model_parallel_size, _itemsize(config), _tokens(config)
    if mode == "full":
        return tokens * model.hidden_size * itemsize / (tensor if parallel.sequence_parallel else 1)
    queries = model.num_attention_heads * model.kv_channels / tensor
    keys = model.num_query_groups * model.kv_channels / tensor
    # The projection's input, and sines and cosines of queries and keys.
    attention = tokens * queries * itemsize + 4 * model.seq_length * model.kv_channels * itemsize
    if model.qk_layernorm:
        attention += tokens * (queries + keys) * _norm_bytes(itemsize)
        if not _norm_casts(itemsize):
            # Keys are a view that keeps the whole fused QKV alive.
            attention += tokens * (queries + keys) * itemsize
    if config.training.local_attention == "sdpa":
        attention += tokens * _fused_bytes(config, queries, keys)
    elif mode == "selective":
        attention += tokens * (queries + 2 * keys) * itemsize
    else:
        # Queries, and keys and values repeated for every query head.
        attention += 3 * tokens * queries * itemsize
        scores = tokens * model.seq_length * model.num_attention_heads / tensor
        # The softmax is in fp32; what it puts out is rounded to the precision of training. And the causal mask.
        attention += scores * (FP32 if itemsize == FP32 else FP32 + itemsize) + model.seq_length**2
    norms = 2 * tokens * model.hidden_size * (_norm_bytes(itemsize) + itemsize)
    return attention + norms / (tensor if parallel.sequence_parallel else 1) + _mlp_bytes(config)


def _fused_bytes(config: Config, queries: float, keys: float) -> float:
    """What torch's attention keeps of a token: queries, keys, values, and a log-sum-exp of each head.

    Its output is the projection's input.
    """
    itemsize = _itemsize(config)
    kept = queries + keys
    if not config.model.qk_layernorm or _norm_casts(itemsize):
        # Values are a view that keeps the whole fused QKV alive; otherwise keys do so already, for QK-norm.
        kept += queries + 2 * keys
    return kept * itemsize + queries / config.model.kv_channels * FP32


def _mlp_bytes(config: Config) -> float:
    """Fused gate and up, SiLU, a copy of up and the product; for each expert of a token, if there are any."""
    model, moe, tensor = config.model, config.moe, config.parallel.tensor_model_parallel_size
    itemsize, tokens = _itemsize(config), _tokens(config)
    if not moe.num_experts:
        return 5 * tokens * model.ffn_hidden_size / tensor * itemsize
    # With sequence parallelism, which experts need, a tensor-parallel rank dispatches its part of the tokens.
    local = tokens / tensor
    routing = local * (9 * moe.num_experts + 16 * moe.moe_router_topk)
    copies = local * moe.moe_router_topk
    # The dispatched token with its index, and one more product: with the gate.
    experts = copies * (model.hidden_size * itemsize + 8 + 6 * moe.moe_ffn_hidden_size * itemsize + FP32)
    shared = 5 * tokens * moe.moe_shared_expert_intermediate_size / tensor * itemsize
    return routing + experts + shared


def _head_bytes(config: Config) -> float:
    """The last norm, and the logits' softmax in fp32."""
    model, parallel, itemsize = config.model, config.parallel, _itemsize(config)
    tensor, tokens = parallel.tensor_model_parallel_size, _tokens(config)
    norm = tokens * model.hidden_size * (_norm_bytes(itemsize) + itemsize)
    return norm / (tensor if parallel.sequence_parallel else 1) + tokens * model.vocab_size / tensor * FP32


def _norm_bytes(itemsize: int) -> int:
    """Bytes per element that RMSNorm keeps: its input; PyTorch's on CPU in fp32, and what it makes of it, too."""
    return itemsize if device.target() == "cuda" else 2 * FP32


def _norm_casts(itemsize: int) -> bool:
    """Whether RMSNorm keeps a copy of its input in another precision."""
    return device.target() == "cpu" and itemsize != FP32


def _itemsize(config: Config) -> int:
    return 2 if config.training.bf16 else FP32


def _tokens(config: Config) -> int:
    """Of one micro-batch."""
    return config.training.micro_batch_size * config.model.seq_length
