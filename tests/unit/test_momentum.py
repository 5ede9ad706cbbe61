"""Muon's momentum in bf16: what is kept is rounded, what is used in this step is not."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp.optim.rules.muon import momentum_

MU = 0.95
# Largest relative error of rounding to bf16: half a unit in the last of 8 bits.
ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def gradients_of(steps: int, shape: tuple[int, ...] = (3, 16, 8)) -> torch.Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0))


def expected(momenta: torch.Tensor, gradients: torch.Tensor, nesterov: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """M <- mu M + G and mu M + G, or M, in float64."""
    updated = MU * momenta.double() + gradients.double()
    return updated, MU * updated + gradients.double() if nesterov else updated


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step(dtype: torch.dtype, nesterov: bool) -> None:
    start, gradients = gradients_of(2)
    momenta = start.to(dtype)
    updated, used = expected(momenta, gradients, nesterov)
    kept = gradients.clone()
    result = momentum_(momenta, gradients, momentum=MU, nesterov=nesterov)
    assert torch.equal(gradients, kept)
    assert (result.dtype, momenta.dtype) == (torch.float32, dtype)
    # Nothing of the precision in which the momentum is kept shows in this step's result.
    torch.testing.assert_close(result.double(), used, rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(momenta.double(), updated, rtol=1e-6, atol=1e-6)
    else:
        assert bool(((momenta.double() - updated).abs() <= (ROUNDING + 1e-6) * updated.abs()).all())
        assert not torch.equal(momenta.double(), updated)


def test_bf16_keeps_the_rounded_momentum_and_uses_the_unrounded_one() -> None:
    start, gradients = gradients_of(2)
    momenta = start.bfloat16()
    updated = momenta.float().mul(MU).add(gradients)
    result = momentum_(momenta, gradients, momentum=MU, nesterov=False)
    assert torch.equal(result, updated)
    assert torch.equal(momenta, updated.bfloat16())
    assert not torch.equal(result, momenta.float())


def test_the_result_is_no_view_of_a_bf16_momentum() -> None:
    start, gradients = gradients_of(2)
    for nesterov in (True, False):
        momenta = start.bfloat16()
        result = momentum_(momenta, gradients, momentum=MU, nesterov=nesterov)
        before = momenta.clone()
        result.zero_()
        assert torch.equal(momenta, before)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_error_of_many_steps_is_that_of_rounding(nesterov: bool) -> None:
    """Each step adds at most half a unit of the largest momentum, and keeps mu of what there was: a geometric sum."""
    gradients = gradients_of(200)
    precise, rounded = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0], dtype=torch.bfloat16)
    largest, worst = 0.0, 0.0
    for gradient in gradients:
        reference = momentum_(precise, gradient, momentum=MU, nesterov=nesterov)
        result = momentum_(rounded, gradient, momentum=MU, nesterov=nesterov)
        largest = max(largest, float(rounded.abs().max()))
        bound = ROUNDING * largest / (1 - MU)
        assert float((rounded.float() - precise).abs().max()) <= bound
        assert float((result - reference).abs().max()) <= bound
        worst = max(worst, float((rounded.float() - precise).abs().max()))
    assert worst > 0
    # Rounding has no preferred sign, so that over a matrix errors add up like noise, to 1/sqrt(1 - mu^2) = 3.2 of one.
    assert float((rounded.float() - precise).norm() / precise.norm()) < 4 * ROUNDING
