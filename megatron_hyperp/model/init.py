"""Initial weights, the same for every parallel layout, with sphere matrices exactly on their spheres.

Each parameter has a generator of its own, seeded by the run's seed and its name in the whole model. A rank draws the
whole matrix and keeps its shard, so neither TP, PP, DP nor the order of construction changes a bit.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core import parallel_state

from megatron_hyperp.config import Config
from megatron_hyperp.optim.sphere import sphere_radius
from megatron_hyperp.parameters import REPLICATED, global_shape, is_expert, named_parameters, partition_dim, role_of


@torch.no_grad()
def initialize(chunk: torch.nn.Module, config: Config) -> None:
    """Set every parameter of a pipeline chunk: Kaiming-uniform hidden matrices and normal output layer, both on their
    spheres; normal embeddings; gains 1, biases 0 (arXiv 2603.28743).

    Raises:
        ValueError: a parameter without a role.
    """
    model = config.model
    for name, parameter in named_parameters(chunk):
        role = role_of(name, parameter)
        if role == "vector":
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        ranks, rank = _tensor_ranks(parameter)
        # With tied embeddings both ends of the pipeline draw the same matrix.
        key = "embedding.word_embeddings.weight" if role == "embedding" else name
        shape = global_shape(parameter, ranks)
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        generator = torch.Generator(device=parameter.device).manual_seed(_seed(config.training.seed, key))
        if role in ("hidden", "router"):
            bound = 1.0 / math.sqrt(shape[1])
            whole.uniform_(-bound, bound, generator=generator)
        else:
            std = model.embedding_init_std if role == "embedding" else model.output_init_std
            assert std is not None
            whole.normal_(0.0, std, generator=generator)
        if role != "embedding":
            radius = sphere_radius(
                role, shape, radius_scale=config.optimizer.radius_scale, output_init_std=model.output_init_std
            )
            whole.mul_(radius / float(torch.linalg.vector_norm(whole, dtype=torch.float64)))
        parameter.copy_(_shard(name, whole, partition_dim(parameter), rank, ranks))


def _tensor_ranks(parameter: torch.Tensor) -> tuple[int, int]:
    """Return how many ranks share the parameter's matrix, and which of them this one is."""
    if is_expert(parameter):
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return group.size(), group.rank()


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _shard(name: str, whole: torch.Tensor, split: int, rank: int, ranks: int) -> torch.Tensor:
    if split == REPLICATED:
        return whole
    if name.endswith("linear_fc1.weight"):
        # A rank holds its share of the gate rows, then of the up rows.
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim=split)[rank]
