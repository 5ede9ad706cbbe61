"""Which update rule each parameter gets: every parameter exactly one, printed at start."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_hyperp.optim.sphere import sphere_radius
from megatron_hyperp.parameters import global_shape, partition_dim, role_of

Rule = Literal["muonh", "adamh", "muon", "adamw"]

# The rule of each role, by --optimizer (arXiv 2603.28743, section on the optimizer's assignment).
RULES: dict[str, dict[str, Rule]] = {
    "hyperp": {"hidden": "muonh", "output": "adamh", "embedding": "adamw", "vector": "adamw"},
    "muonh": {"hidden": "muonh", "output": "adamh", "embedding": "adamw", "vector": "adamw"},
    "muon": {"hidden": "muon", "output": "adamw", "embedding": "adamw", "vector": "adamw"},
    "adamw": {"hidden": "adamw", "output": "adamw", "embedding": "adamw", "vector": "adamw"},
}
SPHERE_RULES = ("muonh", "adamh")


@dataclass(frozen=True, slots=True)
class Route:
    """A parameter with its rule.

    Attributes:
        name: its name in the model, layers numbered over the whole model.
        parameter: this rank's part of it.
        role: a key of :data:`megatron_hyperp.parameters.ROLES`.
        rule: its update rule.
        shape: global shape.
        partition_dim: dimension split over tensor-parallel ranks, or -1.
        radius: of its sphere; None off the sphere.
        lr_mult: factor on the learning rate.
        decays: whether weight decay applies to it.
    """

    name: str
    parameter: torch.nn.Parameter
    role: str
    rule: Rule
    shape: tuple[int, ...]
    partition_dim: int
    radius: float | None
    lr_mult: float
    decays: bool


def route(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    optimizer: str,
    tensor_parallel_size: int,
    radius_scale: float = 1.0,
    output_init_std: float = 0.02,
    matrix_lr_mult: float = 1.0,
    embedding_lr_mult: float = 1.0,
    adam_lr_mult: float = 1.0,
) -> list[Route]:
    """Give every trainable parameter its rule.

    Args:
        named_parameters: names and this rank's parts.
        optimizer: a key of :data:`RULES`.
        tensor_parallel_size: ranks over which parameters marked ``tensor_model_parallel`` are split.
        radius_scale: factor on MuonH radii.
        output_init_std: fixes the output layer's radius.
        matrix_lr_mult: learning-rate factor of hidden matrices (muP).
        embedding_lr_mult: of the token embedding.
        adam_lr_mult: of the output layer, norm gains and biases.

    Raises:
        ValueError: a parameter matches no rule, or two.
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
            continue
        role = role_of(name, parameter)
        rule = RULES[optimizer][role]
        shape = global_shape(parameter, tensor_parallel_size)
        radius = None
        if rule in SPHERE_RULES:
            radius = sphere_radius(role, shape, radius_scale=radius_scale, output_init_std=output_init_std)
        decays = role in ("hidden", "output")
        routes.append(
            Route(name, parameter, role, rule, shape, partition_dim(parameter), radius, lr_mults[role], decays)
        )
    return routes


def describe(routes: Iterable[Route]) -> str:
    """Return the routing table, equal layers on one line."""
    rows: dict[tuple[str, str, str, str, str], int] = {}
    for entry in routes:
        radius = "-" if entry.radius is None else f"{entry.radius:.4g}"
        shape = " x ".join(map(str, entry.shape))
        key = (re.sub(r"\.\d+\.", ".*.", entry.name), entry.rule, shape, radius, f"{entry.lr_mult:g}")
        rows[key] = rows.get(key, 0) + 1
    table = [("parameter", "rule", "global shape", "radius", "lr x", "count")]
    table += [(*key, str(count)) for key, count in rows.items()]
    widths = [max(len(row[column]) for row in table) for column in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
