"""The parameters of a model, and of the part of it that one rank holds, from the config alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_hyperp.config import Config
from megatron_hyperp.parameters import REPLICATED


@dataclass(frozen=True, slots=True)
class Shape:
    """A parameter as a whole.

    Attributes:
        name: in the whole model.
        shape: global shape.
        partition_dim: the dimension that tensor-parallel ranks split, or REPLICATED.
        expert: whether it belongs to a routed expert.
    """

    name: str
    shape: tuple[int, ...]
    partition_dim: int = REPLICATED
    expert: bool = False


def shapes(config: Config) -> Iterator[Shape]:
    """Yield the parameters of the whole model of a resolved config."""
    yield from _stage(config, range(config.model.num_layers), range(config.moe.num_experts), first=True, last=True)


def stage_parameters(config: Config, stage: int) -> list[tuple[str, torch.nn.Parameter]]:
    """Return name and local part, on the meta device, of what a rank of a pipeline stage holds.

    All ranks of a stage hold the like; the experts are those of the first expert-parallel rank.
    """
    model, parallel, stages = config.model, config.parallel, config.parallel.pipeline_model_parallel_size
    layers = model.num_layers // stages
    experts = config.moe.num_experts // parallel.expert_model_parallel_size
    held = _stage(
        config,
        range(stage * layers, (stage + 1) * layers),
        range(experts),
        first=stage == 0,
        last=stage == stages - 1,
    )
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return [(item.name, _local(item, config, dtype)) for item in held]


def _local(item: Shape, config: Config, dtype: torch.dtype) -> torch.nn.Parameter:
    parallel = config.parallel
    ranks = parallel.expert_tensor_parallel_size if item.expert else parallel.tensor_model_parallel_size
    # Marked as in the built model: alone, too, unless it is an expert's.
    split = REPLICATED if item.expert and ranks == 1 else item.partition_dim
    shape = [size // ranks if dim == split else size for dim, size in enumerate(item.shape)]
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    parameter.allreduce = not item.expert  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = split != REPLICATED  # type: ignore[attr-defined]
    parameter.partition_dim = split  # type: ignore[attr-defined]
    return parameter


def _stage(
    config: Config, layers: Iterable[int], experts: Iterable[int], *, first: bool, last: bool
) -> Iterator[Shape]:
    model = config.model
    tied = not model.untie_embeddings_and_output_weights
    table = (model.vocab_size, model.hidden_size)
    if first:
        yield Shape("embedding.word_embeddings.weight", table, 0)
    for number in layers:
        yield from _layer(config, f"decoder.layers.{number}", experts)
    if last:
        yield Shape("decoder.final_layernorm.weight", (model.hidden_size,))
        # Tied, the last of several stages holds a copy of the embedding.
        if not tied or not first:
            yield Shape("output_layer.weight", table, 0)


def _layer(config: Config, prefix: str, experts: Iterable[int]) -> Iterator[Shape]:
    model, moe, width = config.model, config.moe, config.model.hidden_size
    heads, groups = (count * model.kv_channels for count in (model.num_attention_heads, model.num_query_groups))
    attention = f"{prefix}.self_attention"
    yield Shape(f"{prefix}.input_layernorm.weight", (width,))
    yield Shape(f"{attention}.linear_proj.weight", (width, heads), 1)
    yield Shape(f"{attention}.linear_qkv.weight", (heads + 2 * groups, width), 0)
    if model.qk_layernorm:
        yield Shape(f"{attention}.q_layernorm.weight", (model.kv_channels,))
        yield Shape(f"{attention}.k_layernorm.weight", (model.kv_channels,))
    yield Shape(f"{prefix}.pre_mlp_layernorm.weight", (width,))
    if not moe.num_experts:
        yield from _mlp(f"{prefix}.mlp", width, model.ffn_hidden_size)
        return
    yield Shape(f"{prefix}.mlp.router.weight", (moe.num_experts, width))
    for number in experts:
        expert = f"{prefix}.mlp.experts.local_experts.{number}"
        yield from _mlp(expert, width, moe.moe_ffn_hidden_size, expert=True)
    if moe.moe_shared_expert_intermediate_size:
        yield from _mlp(f"{prefix}.mlp.shared_experts", width, moe.moe_shared_expert_intermediate_size)


def _mlp(prefix: str, width: int, ffn: int, *, expert: bool = False) -> Iterator[Shape]:
    yield Shape(f"{prefix}.linear_fc1.weight", (2 * ffn, width), 0, expert)
    yield Shape(f"{prefix}.linear_fc2.weight", (width, ffn), 1, expert)
