"""What a run says of itself at its start."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperp import device, estimate, libraries
from megatron_hyperp.config import Config, data_parallel_size


def describe(config: Config, world_size: int) -> Iterator[str]:
    """Yield lines on the device, the layers, the model, the layout and the learning rate.

    Args:
        config: resolved.
        world_size: ranks of the job.
    """
    model, parallel = config.model, config.parallel
    yield f"megatron-hyperp on {world_size} x {device.describe()}"
    yield libraries.describe(config)
    yield (
        f"model: {estimate.parameter_count(model, config.moe):,} parameters, {model.num_layers} layers, width"
        f" {model.hidden_size}, FFN {model.ffn_hidden_size}, {model.num_attention_heads} heads of"
        f" {model.kv_channels} in {model.num_query_groups} groups, vocabulary {model.vocab_size}"
    )
    if config.moe.num_experts:
        yield _experts(config)
    yield (
        f"layout: TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x DP"
        f" {data_parallel_size(config, world_size)}; {config.training.train_iters} iterations of"
        f" {config.batch_tokens:,} tokens"
    )
    yield config.learning_rate().describe()
    yield (
        f"residual multiplier {model.residual_multiplier:.4g}, attention scale {model.softmax_scale:.4g},"
        f" weight decay {config.optimizer.weight_decay:g}, {config.optimizer.lr_decay_style} decay to"
        f" {config.optimizer.min_lr:.3g}"
    )


def _experts(config: Config) -> str:
    moe, parallel = config.moe, config.parallel
    shared = moe.moe_shared_expert_intermediate_size
    return (
        f"experts: {moe.moe_router_topk} of {moe.num_experts} per token, FFN {moe.moe_ffn_hidden_size}"
        + (f", and a shared one of {shared}" if shared else "")
        + f"; {moe.moe_gate} gate; {estimate.parameter_count(config.model, moe, active=True):,} active"
        f" parameters; EP {parallel.expert_model_parallel_size} x expert TP {parallel.expert_tensor_parallel_size}"
    )
