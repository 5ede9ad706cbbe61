"""Which update rule each parameter gets: every parameter exactly one, printed at start."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.rules import UpdateRule, rule_class
from megatron_hyperp.optim.sphere import sphere_radius
from megatron_hyperp.parameters import (
    DISTINCT,
    MATRIX_ROLES,
    REPLICATED,
    Block,
    global_shape,
    group_of,
    is_expert,
    partition_dim,
    role_of_any,
)
from megatron_hyperp.text import aligned

# Of Megatron-Core's GroupedMLP.
_SEVERAL_EXPERTS = (".experts.weight1", ".experts.weight2")
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
    rule: UpdateRule
    shape: tuple[int, ...]
    partition_dim: int
    radius: float | None
    lr_mult: float
    decays: bool

    @property
    def is_matrix(self) -> bool:
        """Whether its update is the step of a whole matrix."""
        return self.role in MATRIX_ROLES


def route(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    options: HyperPConfig,
    *,
    tensor_parallel_size: int,
    expert_tensor_parallel_size: int = 1,
    heads: Heads | None = None,
) -> list[Route]:
    """Give every trainable parameter its rule; parts of one parameter follow each other.

    Args:
        named_parameters: names and this rank's parts; frozen ones are left out.
        options: which rule each role gets, radii, factors on the learning rate, how matrices are split.
        tensor_parallel_size: ranks over which parameters marked ``tensor_model_parallel`` are split.
        expert_tensor_parallel_size: the same for those of experts.
        heads: layout of QKV weights; needed unless ``matrix_split`` is "fused".

    Raises:
        ValueError: a parameter has no dimensions, or an override that matches one gives it a rule for matrices although
            it is none; or it holds several experts in one matrix.
    """
    classes = options.rules()
    made: dict[tuple[type[UpdateRule], str], UpdateRule] = {}
    routes = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if not parameter.ndim:
            raise ValueError(f"the parameter {name} has no dimensions; give it the shape [1], or freeze it")
        if name.endswith(_SEVERAL_EXPERTS):
            raise ValueError(
                f"the parameter {name} holds all experts of a rank in one matrix: none could have a sphere of its own;"
                " build the layer with SequentialMLP or TEGroupedMLP (moe_grouped_gemm=False)"
            )
        role = role_of_any(name, parameter)
        pattern = next((pattern for pattern in options.overrides if fnmatch.fnmatchcase(name, pattern)), None)
        chosen = classes[role] if pattern is None else rule_class(options.overrides[pattern])
        if parameter.ndim != 2 and (chosen.on_sphere or chosen.needs_matrix):
            raise ValueError(
                f"the rule {chosen.name} takes matrices, but {name} has the shape {tuple(parameter.shape)}; choose"
                f" another for the override {pattern!r}, such as adamw"
            )
        family = group_of(name, role)
        rule = made.setdefault((chosen, family), chosen.of(options, family))
        split = options.matrix_split if rule.needs_matrix else "fused"
        ranks = expert_tensor_parallel_size if is_expert(parameter) else tensor_parallel_size
        for part, block, dim in _parts(name, parameter, split, heads):
            shape = _global_shape(parameter, block, dim, ranks)
            radius = _radius(name, role, shape, options) if rule.on_sphere else None
            mult = options.lr_mults.get(role, 1.0)
            if name.endswith(_QK_GAINS):
                mult = options.lr_mults.get("qk_norm", mult)
            decays = role in MATRIX_ROLES
            routes.append(Route(name + part, parameter, block, role, rule, shape, dim, radius, mult, decays))
    return routes


def _radius(name: str, role: str, shape: tuple[int, ...], options: HyperPConfig) -> float:
    if options.radii is not None:
        return options.radii[name]
    scale, std = options.radius_scale, options.output_init_std
    return sphere_radius(role, shape, radius_scale=scale, output_init_std=std)


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
    if parameter.ndim != 2:
        return global_shape(parameter, ranks)
    return tuple(size * ranks if axis == dim else size for axis, size in enumerate(block.shape))


def describe(routes: Iterable[Route]) -> str:
    """Return the routing table, equal layers on one line."""
    rows: dict[tuple[str, str, str, str], list[float | None]] = {}
    for entry in routes:
        shape = " x ".join(map(str, entry.shape))
        key = (re.sub(r"(?<=[. ])\d+", "*", entry.name), entry.rule.name, shape, f"{entry.lr_mult:g}")
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
