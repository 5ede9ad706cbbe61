"""What is in a checkpoint of ours: where its run stands, every tensor, how far matrices are off their spheres."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hyperp.config import Config
from megatron_hyperp.convert.hyperp import HyperPSource, stored_items
from megatron_hyperp.convert.slabs import Slab
from megatron_hyperp.convert.source import slab_of
from megatron_hyperp.convert.storage import OPTIMIZER_STATE
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optimizer_options import routes_of


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor: a weight, or a state of one.

    Attributes:
        name: of the parameter in the whole model; of a state, its name in the checkpoint.
        shape: global shape, without axes of layers and experts.
        dtype: as stored.
        norm: Frobenius norm.
        rule: the update rule of a weight; empty for states.
        radius: of the sphere it belongs on; of the first one if its parts have spheres of their own; None off spheres.
        deviation: largest |norm / radius - 1| of its parts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    norm: float
    rule: str = ""
    radius: float | None = None
    deviation: float | None = None


def weight_rows(source: HyperPSource) -> Iterator[Row]:
    """Yield every weight, in the order of the model; one at a time is in memory."""
    for name, routes in _routes(source).items():
        tensor = source.read(name)
        first = routes[0]
        off = [abs(_norm(route.block.of(tensor)) / route.radius - 1) for route in routes if route.radius is not None]
        deviation = max(off) if off else None
        yield Row(name, tuple(tensor.shape), tensor.dtype, _norm(tensor), first.rule.name, first.radius, deviation)


def state_rows(source: HyperPSource) -> Iterator[Row]:
    """Yield every tensor of the optimizer's state."""
    for item in stored_items(source):
        if item.slab.key.startswith(OPTIMIZER_STATE):
            yield Row(str(item.slab), item.shape, item.dtype, _norm(item.read()))


def _routes(source: HyperPSource) -> dict[str, list[Route]]:
    """Return the rules of each parameter's parts, as one rank would have them."""
    config = dataclasses.replace(source.config, parallel=dataclasses.replace(source.config.parallel, **_ONE_RANK))
    named = [
        (name, torch.nn.Parameter(torch.empty(shape.shape, device="meta"))) for name, shape in source.parameters.items()
    ]
    found: dict[str, list[Route]] = {name: [] for name, _ in named}
    names = {id(parameter): name for name, parameter in named}
    for route in routes_of(config, named, source.extras.radii):
        found[names[id(route.parameter)]].append(route)
    return found


_ONE_RANK: dict[str, Any] = {"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": 1}


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that two checkpoints do not have alike.

    Attributes:
        name: as in :class:`Row`.
        reason: in words, where values cannot be compared; else empty.
        largest: of |a - b|.
        relative: ||a - b|| / ||a||.
    """

    name: str
    reason: str = ""
    largest: float = 0.0
    relative: float = 0.0


def differences(first: HyperPSource, second: HyperPSource, *, states: bool) -> Iterator[Difference | None]:
    """Compare two checkpoints; yield for each tensor how it differs, or None.

    Args:
        first: "there" in reasons.
        second: "here" in reasons.
        states: compare the optimizer's state as well.
    """
    names = {slab_of(name): name for source in (first, second) for name in source.parameters}
    ours, theirs = (_slabs(source, states=states) for source in (first, second))
    for slab in [*ours, *(slab for slab in theirs if slab not in ours)]:
        name = names.get(slab, str(slab))
        if slab not in theirs or slab not in ours:
            yield Difference(name, "only in the first" if slab in ours else "only in the second")
            continue
        one, other = first.reader.read(slab), second.reader.read(slab)
        yield _difference(name, one, other)


def _slabs(source: HyperPSource, *, states: bool) -> dict[Slab, None]:
    return dict.fromkeys(source.reader.slabs() if states else source.reader.weights())


def _difference(name: str, one: torch.Tensor, other: torch.Tensor) -> Difference | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        there, here = (f"{dtype_name(tensor.dtype)} {list(tensor.shape)}" for tensor in (one, other))
        return Difference(name, f"{there} in the first, {here} in the second")
    # Bits, so that a NaN equals itself.
    if torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return None
    gap = one.double() - other.double()
    norm = _norm(one)
    return Difference(name, "", float(gap.abs().max()), _norm(gap) / norm if norm else float("inf"))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in words, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def config_differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each setting in which two configs differ."""
    found = []
    for section in dataclasses.fields(first):
        one, other = getattr(first, section.name), getattr(second, section.name)
        for item in dataclasses.fields(one):
            if getattr(one, item.name) != getattr(other, item.name):
                found.append((item.name, getattr(one, item.name), getattr(other, item.name)))
    return found
