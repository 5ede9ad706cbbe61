"""Weights on Frobenius spheres: radii, the step along a direction, the retraction. Source: arXiv 2603.28743.

Everything works on families, [count, rows, columns] stacks of equal-shape matrices. Where matrices are sharded, a
rank holds [count, local rows, local columns]; the three inner products below are then summed over the shards and all
else stays local, so one all-reduce of [matrices, 3] numbers serves a whole model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron_hyperp.optim import fading
from megatron_hyperp.optim.magnitudes import rescale_
from megatron_hyperp.optim.rules.base import Part, StateEntry, UpdateRule

SMALLEST_NORM = 1e-30


def muonh_radius(d_out: int, scale: float = 1.0) -> float:
    """Radius sqrt(d_out/3) of a hidden matrix: the expected norm of Kaiming-uniform(a = sqrt 5) weights."""
    return scale * math.sqrt(d_out / 3.0)


def adamh_radius(d_out: int, d_in: int, init_std: float) -> float:
    """Radius init_std sqrt(d_out d_in): the expected norm of N(0, init_std^2) weights."""
    return init_std * math.sqrt(d_out * d_in)


def sphere_radius(role: str, shape: tuple[int, ...], *, radius_scale: float, output_init_std: float) -> float:
    """Radius of a matrix by its role: the output layer's is AdamH's, all others are MuonH's; from the global shape."""
    if role == "output":
        return adamh_radius(shape[0], shape[1], output_init_std)
    return muonh_radius(shape[0], radius_scale)


def inner_products(weights: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return [count, 3] in float64: ||W||^2, <W, U> and ||U||^2 of each matrix, or of the local part of it.

    Args:
        weights: [count, rows, columns].
        directions: the same shape.
    """
    pairs = ((weights, weights), (weights, directions), (directions, directions))
    return torch.stack([dots(x, y) for x, y in pairs], dim=1)


def dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return [count] float64: <X, Y> of each pair of matrices [count, rows, columns].

    Rows are summed in the precision of the matrices, and the sums of rows in float64: a copy of all elements in float64
    takes three times as long on CPU, for a relative error of 1e-10 in place of 3e-9.
    """
    return torch.linalg.vecdot(x, y).sum(dim=1, dtype=torch.float64)


def powers_of(factors: torch.Tensor) -> torch.Tensor:
    """Return [count, 3] float64: what :func:`inner_products` are multiplied by where U is multiplied by ``factors``."""
    factors = factors.double()
    return torch.stack([torch.ones_like(factors), factors, factors.square()], dim=1)


def move_of(
    products: torch.Tensor, *, radii: torch.Tensor, lr: float, shares: torch.Tensor | None = None
) -> torch.Tensor:
    """Return lr R / ||U||, the factor on U that makes the step a fraction of the radius, [count]; as :func:`step_`."""
    norms = products[:, 2].sqrt()
    moves = torch.where(norms == 0, 0.0, lr * radii / norms)
    return moves if shares is None else moves * shares


def step_(
    weights: torch.Tensor,
    directions: torch.Tensor,
    products: torch.Tensor,
    *,
    radii: torch.Tensor,
    lr: float,
    weight_decay: float = 0.0,
    shares: torch.Tensor | None = None,
) -> None:
    """Move each matrix by the fraction ``lr`` of its radius against its direction, and back onto its sphere; in place.

    W <- (1 - lr lambda) W - lr (R/||U||) U, then W <- W R/||W||. The norm after the move follows from the inner
    products before it, so a sharded matrix needs no second reduction.

    Args:
        weights: [count, rows, columns] fp32, global or local parts.
        directions: the same shape, with largest elements near 1 (:func:`~megatron_hyperp.optim.magnitudes.rescale_`;
            the step does not depend on their size); a zero direction moves nothing.
        products: :func:`inner_products` of the global matrices.
        radii: [count] float64.
        lr: the fraction eta.
        weight_decay: lambda; radial, so without effect on the direction to first order in lr.
        shares: [count] float64, factors on lr (:func:`megatron_hyperp.optim.fading.shares`); None: all 1.
    """
    ww, wu, uu = products.unbind(dim=1)
    shrink = 1.0 - lr * weight_decay
    move = move_of(products, radii=radii, lr=lr, shares=shares)
    moved = (shrink * shrink * ww - 2.0 * shrink * move * wu + move * move * uu).clamp_min(0.0).sqrt()
    retract = radii / moved.clamp_min(SMALLEST_NORM)
    weights.mul_(_column(retract * shrink, weights)).sub_(directions * _column(retract * move, weights))


def relative_drift(
    weights: torch.Tensor, radii: torch.Tensor, squared_norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [count] float64: | ||W||/R - 1 | for each matrix; ``squared_norms`` replaces the local ||W||^2."""
    if squared_norms is None:
        squared_norms = dots(weights, weights)
    return (squared_norms.sqrt() / radii - 1.0).abs()


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype)[:, None, None]


class SphereOptimizer(torch.optim.Optimizer):
    """A one-rank optimizer of matrices on spheres; subclasses name the update rule.

    Matrices of one group with equal shape and dtype are one family and are processed as one batch.

    Args:
        params: 2-D tensors, or groups of them.
        defaults: the group defaults, among them ``lr`` and ``weight_decay``.
        radius: "stateless" (:meth:`stateless_radius`), "from-weights" (each norm at construction) or a number.

    What a matrix does while its gradient is exactly zero is ``zero_gradients`` of the defaults or of a group: "fade",
    the default: its step fades as its momentum does (:mod:`~megatron_hyperp.optim.fading`); or "walk": it moves on at
    full step in the direction of its last momentum, for comparison with implementations that do so.

    Raises:
        ValueError: a parameter is not 2-D, a hyperparameter is out of range, or a radius "from-weights" is of a matrix
            of zeros; the message has the value.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], radius: str | float) -> None:
        if not defaults["lr"] > 0:
            raise ValueError(f"lr is {defaults['lr']}; it must be greater than 0")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}; it must not be negative")
        if radius not in ("stateless", "from-weights") and not (isinstance(radius, (int, float)) and radius > 0):
            raise ValueError(f'radius is {radius!r}; it must be "stateless", "from-weights" or a positive number')
        super().__init__(params, {"zero_gradients": "fade", **defaults, "radius": radius})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; radii "from-weights" are read now and kept in it, so a state dict carries them."""
        fading.check_zero_gradients(param_group.get("zero_gradients", self.defaults["zero_gradients"]))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if parameter.ndim != 2:
                raise ValueError(f"{type(self).__name__} takes matrices, got the shape {tuple(parameter.shape)}")
        group["radii"] = [self._radius(parameter, group) for parameter in group["params"]]

    def _radius(self, parameter: torch.Tensor, group: dict[str, Any]) -> float:
        if group["radius"] == "stateless":
            return self.stateless_radius(parameter, group)
        if group["radius"] == "from-weights":
            norm = float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64))
            if not 0 < norm < math.inf:
                raise ValueError(f'radius is "from-weights", but the norm of a matrix is {norm}; give a number')
            return norm
        return float(group["radius"])

    @abstractmethod
    def stateless_radius(self, parameter: torch.Tensor, group: dict[str, Any]) -> float:
        """Radius of a matrix from its shape alone."""

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> UpdateRule:
        """Return the update rule that a group's hyperparameters make."""

    def directions(
        self, family: Sequence[torch.Tensor], gradients: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Update the state of a family and return its directions U, [count, rows, columns]; W moves along -U."""
        rule = self.rule(group)
        entries = rule.state_entries()
        state = {name: self.stacked_state(family, name, entry) for name, entry in entries.items()}
        direction = rule.direction_(gradients, state, Part(group["steps_taken"], *family[0].shape))
        for name, stacked in state.items():
            self.keep_state(family, name, stacked)
        return direction

    def momentum_of(self, group: dict[str, Any]) -> tuple[str, float] | None:
        """Return the state entry and the decay of the momentum that steps fade with; None if they do not fade."""
        return None if group["zero_gradients"] == "walk" else self.rule(group).fading()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps_taken"] = group.get("steps_taken", 0) + 1
            for indices in _families(group["params"]):
                family = [group["params"][index] for index in indices]
                dtype = torch.promote_types(family[0].dtype, torch.float32)
                weights = torch.stack([parameter.detach() for parameter in family]).to(dtype)
                gradients = torch.stack([parameter.grad for parameter in family]).to(dtype)
                radii = torch.tensor([group["radii"][index] for index in indices], dtype=torch.float64)
                nonzero = fading.received(gradients)
                directions = self.directions(family, gradients, group)
                shares = self._count_idle(family, nonzero, group)
                rescale_(directions)
                step_(
                    weights,
                    directions,
                    inner_products(weights, directions),
                    radii=radii.to(weights.device),
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    shares=shares,
                )
                for parameter, weight in zip(family, weights, strict=True):
                    parameter.copy_(weight)
        return loss

    def _count_idle(
        self, family: Sequence[torch.Tensor], received: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor | None:
        """Count steps without a gradient, and clear momenta at rest; return the shares of steps, None to walk."""
        idle = self.stacked_state(family, fading.IDLE_STEPS, StateEntry("rows"))
        steps = fading.count_idle_(idle, received)
        self.keep_state(family, fading.IDLE_STEPS, idle)
        momentum = self.momentum_of(group)
        if momentum is None:
            return None
        name, decay = momentum
        shares = fading.shares(steps, decay)
        for parameter, share in zip(family, shares, strict=True):
            self.state[parameter][name].mul_(share > 0)
        return shares

    def idle_matrices(self) -> int:
        """Return how many matrices had a gradient of exactly zero in their last step; waits for the device."""
        return sum(int(bool(state[fading.IDLE_STEPS].any())) for state in self.state.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; state keeps its precision (torch casts it to that of the parameters)."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            # Of an earlier version that had no choice.
            group.setdefault("zero_gradients", self.defaults["zero_gradients"])
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in values.items()}

    def stacked_state(self, family: Sequence[torch.Tensor], name: str, entry: StateEntry) -> torch.Tensor:
        """Return the state ``name`` of a family, at least fp32, stacked; zeros at first."""
        dtype = torch.promote_types(family[0].dtype, entry.dtype)
        for parameter in family:
            if name not in self.state[parameter]:
                self.state[parameter][name] = parameter.new_zeros(entry.of(*parameter.shape), dtype=dtype)
        return torch.stack([self.state[parameter][name] for parameter in family])

    def keep_state(self, family: Sequence[torch.Tensor], name: str, stacked: torch.Tensor) -> None:
        """Write a stacked state back to its parameters."""
        for parameter, value in zip(family, stacked, strict=True):
            self.state[parameter][name].copy_(value)


def _families(parameters: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Group the indices of parameters that have a gradient by shape, dtype and device."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            families.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(index)
    return families.values()
