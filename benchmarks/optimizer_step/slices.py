"""Slices of the paper's models, at a quarter of the width, that two cores can step."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_hyperp.config import Config, ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, TrainingConfig

SCALE = 4
GRANULARITY = 8
LR = 0.015


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of one of the paper's models, at 1:SCALE of its width and vocabulary.

    Attributes:
        depth: of the paper's model, from which the width follows.
        layers: of it.
        vocabulary: rows of the embedding, cut in the same proportion as the layers.
        experts: of each layer, an eighth as wide as the dense MLP; 0 for a dense model.
    """

    depth: int
    layers: int
    vocabulary: int
    experts: int = 0


SLICES = {
    "d8": Slice(8, layers=8, vocabulary=8000),
    "d24": Slice(24, layers=2, vocabulary=672),
    "moe-d8": Slice(8, layers=1, vocabulary=1000, experts=64),
    "moe-d24": Slice(24, layers=1, vocabulary=336, experts=16),
    "tiny": Slice(4, layers=1, vocabulary=64, experts=8),
}


def config_of(part: Slice, tensor_ranks: int, optimizer: str, strategy: str, world_size: int | None = None) -> Config:
    """Return the resolved config of a slice; tensor-parallel ranks share the matrices of experts, too.

    Args:
        part: the slice.
        tensor_ranks: of all ranks.
        optimizer: the update rule.
        strategy: how tensor-parallel ranks share Newton-Schulz.
        world_size: all ranks; None for those of the process group.
    """
    world_size = world_size or dist.get_world_size()
    config = Config(
        model=ModelConfig(
            depth=part.depth, aspect_ratio=128 // SCALE, num_layers=part.layers, vocab_size=part.vocabulary
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_ranks),
        optimizer=OptimizerConfig(optimizer=optimizer, lr=LR, ns_strategy=strategy),  # type: ignore[arg-type]
        training=TrainingConfig(global_batch_size=world_size, train_iters=1),
    )
    if part.experts:
        width = config.model.aspect_ratio * part.depth
        config.moe = MoEConfig(num_experts=part.experts, moe_ffn_hidden_size=4 * width // GRANULARITY)
        config.parallel.expert_tensor_parallel_size = tensor_ranks
        config.parallel.sequence_parallel = tensor_ranks > 1
    return config.resolve(world_size=world_size)
