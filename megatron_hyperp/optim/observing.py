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

GROUPS = ("embedding", "output", "attention", "mlp", "experts", "router", "vectors")
# Groups of matrices inside layers.
MATRIX_GROUPS = ("attention", "mlp", "experts", "router")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def group_of(name: str, role: str) -> str:
    """Return the group, one of :data:`GROUPS`, of a parameter; shared experts are the MLP's."""
    if role == "vector":
        return "vectors"
    if role != "hidden":
        return role
    if ".self_attention." in name:
        return "attention"
    if ".mlp.router." in name:
        return "router"
    return "experts" if ".experts." in name else "mlp"


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
    """Collects what one step does.

    Args:
        layers: of the whole model.
    """

    def __init__(self, layers: int) -> None:
        home = device.device()
        self._squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=home)
        # [angle or drift, layer, group]; a rank leaves 0 where it holds nothing.
        self._largest = torch.zeros((2, layers, len(MATRIX_GROUPS)), dtype=torch.float64, device=home)
        self._reduced = False

    def gradients(self, family: Family, gradients: torch.Tensor, weight: float) -> None:
        """Take in a family's gradients [count, rows, columns]; ``weight`` is 0 for copies that others count."""
        groups = [GROUPS.index(group_of(entry.name, entry.role)) for entry in family.routes]
        squares = weight * (gradients * gradients).sum(dim=(1, 2), dtype=torch.float64)
        self._squares.index_add_(0, torch.tensor(groups, device=squares.device), squares)

    def angles(self, family: Family, angles: torch.Tensor) -> None:
        """Take in the angles [count] that the matrices of a family turn."""
        self._take(0, family, angles)

    def drifts(self, family: Family, drifts: torch.Tensor) -> None:
        """Take in | ||W||/R - 1 | of a family's matrices, [count]."""
        self._take(1, family, drifts)

    def _take(self, which: int, family: Family, values: torch.Tensor) -> None:
        places = []
        for entry in family.routes:
            layer, group = _LAYER.search(entry.name), group_of(entry.name, entry.role)
            inside = layer is not None and group in MATRIX_GROUPS
            places.append(int(layer[1]) * len(MATRIX_GROUPS) + MATRIX_GROUPS.index(group) if layer and inside else -1)
        index = torch.tensor(places, device=values.device)
        flat = self._largest[which].view(-1)
        flat.scatter_reduce_(0, index[index >= 0], values.to(flat.dtype)[index >= 0], "amax")

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Take the sums and the largest values over all ranks; a collective call."""
        dist.all_reduce(self._squares, group=group)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=group)
        self._reduced = True

    def metrics(self, present: Sequence[str]) -> dict[str, float | list[float]]:
        """Return what was seen: a norm for each group, per layer the largest angle of a group and the largest drift.

        Args:
            present: groups that the model has.
        """
        assert self._reduced
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
