"""Numbers that are not finite, by the name of their tensor: why a step was left out, and whether weights are sound.

Nothing here is computed in a step that is taken, but for one flag (:func:`any_on_a_rank`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_hyperp import device

if TYPE_CHECKING:
    from megatron_hyperp.optim.distributed import HyperPOptimizer
    from megatron_hyperp.optim.families import Family

# Kinds, from what causes the others to what follows from them.
STATE, WEIGHT, GRADIENT, UPDATE = range(4)


@dataclass(frozen=True, slots=True)
class Fault:
    """Numbers that are not finite somewhere in the job; the same on all ranks.

    Attributes:
        kind: ``STATE`` (the optimizer's fp32 weights or its state, which no step can repair), ``WEIGHT`` (the model's
            copy of weights whose fp32 masters are finite), ``GRADIENT`` or ``UPDATE``.
        text: a sentence: which tensor of which rank, and how many more.
    """

    kind: int
    text: str


def any_on_a_rank(flags: Sequence[torch.Tensor]) -> bool:
    """Return whether any of some booleans, on the device, is true on any rank; a collective call."""
    found = torch.stack([torch.zeros((), dtype=torch.bool, device=device.device()), *flags]).any().double()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def find_fault(
    optimizer: HyperPOptimizer, kind: int = UPDATE, suspects: Sequence[torch.Tensor] | None = None
) -> Fault | None:
    """Look for numbers that are not finite in the optimizer's state, the weights, and then the suspects; collective.

    Args:
        optimizer: whose step was left out, or whose state was loaded.
        kind: of the suspects, ``GRADIENT`` or ``UPDATE``.
        suspects: of each family, its gradients or updates [count, rows, columns]; None: there are no suspects.
    """
    optimizer.exchange.finish_param_sync()
    families = optimizer.families
    found = [(STATE, _state(families)), (WEIGHT, _weights(optimizer))]
    if suspects is not None:
        what = "the gradient" if kind == GRADIENT else "the update"
        found.append((kind, [name for f, x in zip(families, suspects, strict=True) for name in _bad(what, f, x)]))
    mine = next(((place, names[0], len(names)) for place, names in found if names), None)
    gathered: list[tuple[int, str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    reports = [
        (place, rank, name, count) for rank, each in enumerate(gathered) if each for place, name, count in [each]
    ]
    if not reports:
        return None
    place, rank, name, count = min(reports)
    more = f" (nor {count - 1} more there)" if count > 1 else ""
    return Fault(place, f"{name} on rank {rank} is not finite{more}")


def _bad(what: str, family: Family, stacked: torch.Tensor) -> list[str]:
    """Return the names of the matrices of a stack that are not finite."""
    finite = stacked.isfinite().flatten(1).all(dim=1).tolist()
    return [f"{what} of {entry.name}" for entry, sound in zip(family.routes, finite, strict=True) if not sound]


def _state(families: Iterable[Family]) -> list[str]:
    names = []
    for family in families:
        for name, stacked in family.tensors().items():
            names += _bad("the fp32 weight" if name == "master" else f"the optimizer's {name}", family, stacked)
    return names


def _weights(optimizer: HyperPOptimizer) -> list[str]:
    # Under --matrix-split a parameter has several routes.
    routes = [entry for domain in optimizer.domains for entry in domain.routes]
    named = {entry.name.partition("[")[0]: entry.parameter for entry in routes}
    return [f"the weight {name}" for name, each in named.items() if not bool(each.detach().isfinite().all())]
