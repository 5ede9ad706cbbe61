"""What a step does: gradient norms by group, how far each matrix turns, and its distance from its sphere.

Nothing here is computed unless a step is observed; then all of it takes two small all-reduces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.optim.families import Family
from megatron_hyperp.optim.magnitudes import squared_norms
from megatron_hyperp.parameters import GROUPS, MATRIX_GROUPS, group_of

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def turned(products: torch.Tensor, *, shrink: float, move: torch.Tensor | float) -> torch.Tensor:
    """Return the angle between W and shrink W - move U, in radians, [count].

    Args:
        products: [count, 3] float64, ||W||^2, <W, U> and ||U||^2 of global matrices.
        shrink: what weight decay leaves.
        move: length of the step over that of U, [count] or one number.
    """
    ww, wu, uu = products.unbind(dim=1)
    # |W x U| from Lagrange's identity: exact for small angles too, unlike an arc cosine.
    across = move * (ww * uu - wu * wu).clamp_min(0.0).sqrt()
    return torch.atan2(across, shrink * ww - move * wu)


class StepObserver:
    """Collects what a step does; one object serves all steps that are observed.

    Args:
        layers: of the whole model.
        families: what this rank owns.
    """

    def __init__(self, layers: int, families: Sequence[Family]) -> None:
        home = device.device()
        self._squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=home)
        # [angle or drift, layer, group]; a rank leaves 0 where it holds nothing.
        self._largest = torch.zeros((2, layers, len(MATRIX_GROUPS)), dtype=torch.float64, device=home)
        # Names are looked at here, once: experts come by the thousand.
        self._groups, self._places = (
            {id(family): torch.tensor(numbers(family), dtype=torch.long, device=home) for family in families}
            for numbers in (_groups, _places)
        )

    def clear(self) -> None:
        """Forget the step before."""
        self._squares.zero_()
        self._largest.zero_()

    def gradients(self, family: Family, gradients: torch.Tensor, weight: float) -> None:
        """Take in a family's gradients [count, rows, columns]; ``weight`` is 0 for copies that others count."""
        squares = weight * squared_norms(gradients)
        self._squares.index_add_(0, self._groups[id(family)], squares)

    def angles(self, family: Family, angles: torch.Tensor) -> None:
        """Take in the angles [count] that the matrices of a family turn."""
        self._take(0, family, angles)

    def drifts(self, family: Family, drifts: torch.Tensor) -> None:
        """Take in | ||W||/R - 1 | of a family's matrices, [count]."""
        self._take(1, family, drifts)

    def _take(self, which: int, family: Family, values: torch.Tensor) -> None:
        places = self._places[id(family)]
        if len(places):
            flat = self._largest[which].view(-1)
            flat.scatter_reduce_(0, places, values.to(flat.dtype), "amax")

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Take the sums and the largest values over all ranks; a collective call."""
        dist.all_reduce(self._squares, group=group)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=group)

    def metrics(self, present: Sequence[str]) -> dict[str, float | list[float]]:
        """Return what was seen, after :meth:`reduce`: norms by group, and per layer the largest angles and drift.

        Args:
            present: groups that the model has.
        """
        norms = self._squares.sqrt().tolist()
        result: dict[str, float | list[float]] = {
            f"grad_norm_{name}": value for name, value in zip(GROUPS, norms, strict=True) if name in present
        }
        angles, drifts = self._largest
        for index, name in enumerate(MATRIX_GROUPS):
            if name in present:
                result[f"angle_{name}"] = float(angles[:, index].max())
                result[f"angle_{name}_per_layer"] = angles[:, index].tolist()
        result["radius_drift_per_layer"] = drifts.amax(dim=1).tolist()
        return result


def _groups(family: Family) -> list[int]:
    """Group of each parameter of a family."""
    return [GROUPS.index(group_of(entry.name, entry.role)) for entry in family.routes]


def _places(family: Family) -> list[int]:
    """Layer and group of each matrix of a family, as one number; none for a family that is of no layer."""
    places = []
    for entry in family.routes:
        layer, group = _LAYER.search(entry.name), group_of(entry.name, entry.role)
        if layer and group in MATRIX_GROUPS:
            places.append(int(layer[1]) * len(MATRIX_GROUPS) + MATRIX_GROUPS.index(group))
    assert len(places) in (0, len(family.routes))
    return places
