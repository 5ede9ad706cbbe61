"""Which update rule each parameter gets: every parameter exactly one, printed at start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_hyperp.config import Config, width_multiplier
from megatron_hyperp.optim.sphere import sphere_radius
from megatron_hyperp.parameters import DISTINCT, REPLICATED, Block, global_shape, is_expert, partition_dim, role_of
from megatron_hyperp.text import aligned

Rule = Literal["muonh", "adamh", "muon", "adamw"]

# The rule of each role, by --optimizer (arXiv 2603.28743, section on the optimizer's assignment).
RULES: dict[str, dict[str, Rule]] = {
    "hyperp": {"hidden": "muonh", "output": "adamh", "embedding": "adamw", "vector": "adamw"},
    "muonh": {"hidden": "muonh", "output": "adamh", "embedding": "adamw", "vector": "adamw"},
    "muon": {"hidden": "muon", "output": "adamw", "embedding": "adamw", "vector": "adamw"},
    "adamw": {"hidden": "adamw", "output": "adamw", "embedding": "adamw", "vector": "adamw"},
}
# Roles whose updates are steps of whole matrices; an embedding is a table of vectors.
MATRIX_ROLES = ("hidden", "output")
SPHERE_RULES = ("muonh", "adamh")
# Rules that orthogonalize, so that they need whole matrices.
MUON_RULES = ("muonh", "muon")
_QK_GAINS = (".q_layernorm.weight", ".k_layernorm.weight")


@dataclass(frozen=True, slots=True)
class Heads:
    """How a fused QKV weight is laid out: per key-value group, the rows of its queries, its key and its value.

    Attributes:
        size: rows of one head.
        queries: query heads in a group.
    """

    size: int
    queries: int


@dataclass(frozen=True, slots=True)
class Route:
    """A matrix or vector with its rule: a parameter, or a part of one under ``--matrix-split``.

    Attributes:
        name: the parameter's name in the model, layers numbered over the whole model, and the part's.
        parameter: this rank's part of the parameter.
        block: the part of that tensor which the route is about.
        role: a key of :data:`megatron_hyperp.parameters.ROLES`.
        rule: its update rule.
        shape: global shape.
        partition_dim: dimension split over tensor-parallel ranks, or REPLICATED, or DISTINCT where each has its own.
        radius: of its sphere; None off the sphere.
        lr_mult: factor on the learning rate.
        decays: whether weight decay applies to it.
    """

    name: str
    parameter: torch.nn.Parameter
    block: Block
    role: str
    rule: Rule
    shape: tuple[int, ...]
    partition_dim: int
    radius: float | None
    lr_mult: float
    decays: bool

    @property
    def orthogonalized(self) -> bool:
        """Whether the rule needs whole matrices."""
        return self.rule in MUON_RULES


def route(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    optimizer: str,
    tensor_parallel_size: int,
    expert_tensor_parallel_size: int = 1,
    radius_scale: float = 1.0,
    output_init_std: float = 0.02,
    matrix_lr_mult: float = 1.0,
    embedding_lr_mult: float = 1.0,
    adam_lr_mult: float = 1.0,
    qk_norm_lr_mult: float = 1.0,
    matrix_split: str = "fused",
    heads: Heads | None = None,
    radii: Mapping[str, float] | None = None,
) -> list[Route]:
    """Give every parameter its rule; parts of one parameter follow each other.

    Args:
        named_parameters: names and this rank's parts.
        optimizer: a key of :data:`RULES`.
        tensor_parallel_size: ranks over which parameters marked ``tensor_model_parallel`` are split.
        expert_tensor_parallel_size: the same for those of experts.
        radius_scale: factor on MuonH radii.
        output_init_std: fixes the output layer's radius.
        matrix_lr_mult: learning-rate factor of hidden matrices (muP).
        embedding_lr_mult: of the token embedding.
        adam_lr_mult: of the output layer, norm gains and biases.
        qk_norm_lr_mult: further one of the gains on queries and keys.
        matrix_split: whether fused QKV and gate/up weights are one matrix ("fused"), one per component ("component"),
            or QKV one per head ("head"), each then orthogonalized and on a sphere by itself.
        heads: layout of QKV weights; needed unless "fused".
        radii: of spheres that do not follow from shapes, by the parameter's name; "fused" alone.

    Raises:
        ValueError: a parameter matches no rule, or two, or is frozen.
    """
    lr_mults = {
        "hidden": matrix_lr_mult,
        "embedding": embedding_lr_mult,
        "output": adam_lr_mult,
        "vector": adam_lr_mult,
    }
    routes = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            raise ValueError(f"the parameter {name} is frozen; checkpoints would have a hole in its place: train it")
        role = role_of(name, parameter)
        rule = RULES[optimizer][role]
        split = matrix_split if rule in MUON_RULES else "fused"
        ranks = expert_tensor_parallel_size if is_expert(parameter) else tensor_parallel_size
        for part, block, dim in _parts(name, parameter, split, heads):
            shape = _global_shape(parameter, block, dim, ranks)
            radius = None
            if rule in SPHERE_RULES and radii is not None:
                radius = radii[name]
            elif rule in SPHERE_RULES:
                radius = sphere_radius(role, shape, radius_scale=radius_scale, output_init_std=output_init_std)
            decays = role in ("hidden", "output")
            lr_mult = lr_mults[role] * (qk_norm_lr_mult if name.endswith(_QK_GAINS) else 1.0)
            routes.append(Route(name + part, parameter, block, role, rule, shape, dim, radius, lr_mult, decays))
    return routes


def routes_of(
    config: Config,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    radii: Mapping[str, float] | None = None,
) -> list[Route]:
    """Give every parameter its rule by a resolved config; see :func:`route`."""
    options, model, parallel = config.optimizer, config.model, config.parallel
    return route(
        named_parameters,
        optimizer=options.optimizer,
        tensor_parallel_size=parallel.tensor_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        radius_scale=options.radius_scale,
        output_init_std=model.output_init_std,
        matrix_lr_mult=width_multiplier(config),
        embedding_lr_mult=options.embedding_lr_mult,
        adam_lr_mult=options.adam_lr_mult,
        qk_norm_lr_mult=options.qk_norm_lr_mult,
        matrix_split=options.matrix_split,
        heads=Heads(model.kv_channels, model.num_attention_heads // model.num_query_groups),
        radii=radii,
    )


def _parts(name: str, parameter: torch.Tensor, split: str, heads: Heads | None) -> Iterator[tuple[str, Block, int]]:
    """Yield suffix, block and partition dimension of the matrices that a parameter consists of.

    A tensor-parallel rank holds whole key-value groups, and its share of the gate rows and of the up rows, so each
    component is sharded like the fused weight, while each head is whole on one rank.
    """
    dim, whole = partition_dim(parameter), Block.whole(parameter)
    if split != "fused" and name.endswith("linear_fc1.weight"):
        gate, up = whole.cut(0, 2)
        yield "[gate]", gate, dim
        yield "[up]", up, dim
    elif split != "fused" and name.endswith("linear_qkv.weight"):
        assert heads is not None
        groups = whole.rows // ((heads.queries + 2) * heads.size)
        if split == "component":
            queries = heads.queries
            for part, first, count in (("[q]", 0, queries), ("[k]", queries, 1), ("[v]", queries + 1, 1)):
                yield part, Block(groups, first * heads.size, count * heads.size, 0, whole.columns), dim
        else:
            own = REPLICATED if dim == REPLICATED else DISTINCT
            for index, block in enumerate(whole.cut(0, groups * (heads.queries + 2))):
                yield f"[head {index}]", block, own
    else:
        yield "", whole, dim


def _global_shape(parameter: torch.Tensor, block: Block, dim: int, ranks: int) -> tuple[int, ...]:
    if parameter.ndim == 1:
        return global_shape(parameter, ranks)
    return tuple(size * ranks if axis == dim else size for axis, size in enumerate(block.shape))


def describe(routes: Iterable[Route]) -> str:
    """Return the routing table, equal layers on one line."""
    rows: dict[tuple[str, str, str, str], list[float | None]] = {}
    for entry in routes:
        shape = " x ".join(map(str, entry.shape))
        key = (re.sub(r"(?<=[. ])\d+", "*", entry.name), entry.rule, shape, f"{entry.lr_mult:g}")
        rows.setdefault(key, []).append(entry.radius)
    table = [("parameter", "rule", "global shape", "radius", "lr x", "count")]
    table += [(*key[:3], _range(radii), key[3], str(len(radii))) for key, radii in rows.items()]
    return "\n".join(aligned(table))


def _range(radii: Iterable[float | None]) -> str:
    """Radii of a row in words: mostly one."""
    known = [radius for radius in radii if radius is not None]
    if not known:
        return "-"
    ends = [f"{radius:.4g}" for radius in (min(known), max(known))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
