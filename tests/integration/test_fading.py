"""Two thousand steps, of which all but the first hundred have no gradient: the one-rank optimizers on spheres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_hyperp.optim import AdamH, MuonH
from megatron_hyperp.optim.sphere import SphereOptimizer, relative_drift
from tests import tolerances

STEPS, LAST = 2000, 100
RADIUS, LR = 2.0, 0.02
SHAPE = (16, 24)
# As the gradients' elements, small enough for their squares to underflow, and for momenta to be denormal soon.
SIZES = (1e-3, 1e-30, 1e-37)


@dataclass(frozen=True)
class Track:
    """What one matrix did.

    Attributes:
        moved: sum of its steps' lengths from the last gradient's on, as shares of lr R.
        drift: largest | ||W||/R - 1 |.
        rest: steps at the end in which not a bit of it changed.
        finite: whether it always was.
        left: whether anything of the momentum is left.
    """

    moved: float
    drift: float
    rest: int
    finite: bool
    left: bool


def muonh(weights: list[torch.nn.Parameter], mode: str, dtype: torch.dtype = torch.float32) -> MuonH:
    return MuonH([{"params": weights, "zero_gradients": mode}], lr=LR, radius=RADIUS, ns_dtype=dtype)


def adamh(weights: list[torch.nn.Parameter], mode: str) -> AdamH:
    # Its eps is far below the gradients.
    return AdamH([{"params": weights, "zero_gradients": mode}], lr=LR, radius=RADIUS, eps=1e-44)


def follow(optimizer: SphereOptimizer, entry: str) -> list[Track]:
    """Train one matrix of each of :data:`SIZES`, with gradients up to step :data:`LAST`."""
    random = torch.Generator().manual_seed(0)
    weights = optimizer.param_groups[0]["params"]
    radii = torch.full((len(weights),), RADIUS, dtype=torch.float64)
    moved, drifts = torch.zeros(len(weights), dtype=torch.float64), torch.zeros(len(weights), dtype=torch.float64)
    rest, finite = torch.zeros(len(weights)), True
    for step in range(STEPS):
        gradient = torch.randn(SHAPE, generator=random) if step < LAST else torch.zeros(SHAPE)
        before = torch.stack([weight.detach() for weight in weights])
        for weight, size in zip(weights, SIZES, strict=True):
            weight.grad = gradient * size
        optimizer.step()
        after = torch.stack([weight.detach() for weight in weights])
        lengths = torch.linalg.vector_norm((after - before).double(), dim=(1, 2))
        if step >= LAST - 1:
            moved += lengths / (LR * RADIUS)
        rest = torch.where(lengths == 0, rest + 1, 0)
        drifts = torch.maximum(drifts, relative_drift(after, radii))
        finite &= bool(after.isfinite().all())
    return [
        Track(float(moved[i]), float(drifts[i]), int(rest[i]), finite, bool(optimizer.state[weight][entry].any()))
        for i, weight in enumerate(weights)
    ]


def matrices() -> list[torch.nn.Parameter]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return [torch.nn.Parameter(RADIUS * weight / weight.norm()) for _ in SIZES]


@pytest.mark.parametrize(
    ("make", "entry", "worth", "until_rest"),
    [(muonh, "momentum_buffer", 20, 330), (adamh, "exp_avg", 10, 165)],
    ids=["muonh", "adamh"],
)
def test_a_matrix_without_gradients_comes_to_rest(make: Any, entry: str, worth: float, until_rest: int) -> None:
    for track in follow(make(matrices(), "fade"), entry):
        assert track.finite
        assert track.drift < tolerances.RADIUS_DRIFT
        assert track.moved < worth + 1
        assert track.moved > 0.8 * worth
        assert track.rest >= STEPS - LAST - until_rest
        assert not track.left


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.matrix)])
def test_a_walking_matrix_stays_finite_and_on_its_sphere(dtype: torch.dtype) -> None:
    for track in follow(muonh(matrices(), "walk", dtype), "momentum_buffer"):
        assert track.finite
        assert track.drift < tolerances.RADIUS_DRIFT
        # It turns towards the direction in which it goes, so that steps of full length move it less and less.
        assert track.moved > 60
        # Denormal elements do not vanish: 0.95 times ten units rounds to ten.
        assert track.left
