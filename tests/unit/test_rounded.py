"""Momenta in fp16 with a power of two for each matrix: how they are rounded, at which sizes, in which parts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hyperp.optim.rounded import restored, round_to_half, store_

# Relative to the element, and to the largest of its matrix.
NORMAL, SMALLEST = 2.0**-11, 2.0**-37
MU = 0.95


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(*shape: int, decades: float = 12) -> torch.Tensor:
    """Elements of sizes from 1 to 10^-decades."""
    exponents = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return random(*shape) * 10.0 ** (-decades * exponents)


def again(x: torch.Tensor) -> torch.Tensor:
    return restored(*round_to_half(x))


@pytest.mark.parametrize("power", [-100, -60, -14, 0, 14, 60, 120])
def test_errors_are_of_eleven_bits_at_every_size(power: int) -> None:
    x = spread(4, 16, 24)
    x[1] *= 1e-6
    x *= 2.0**power
    values, units = round_to_half(x)
    assert (values.dtype, units.dtype, units.shape) == (torch.float16, torch.float32, (4,))
    assert torch.equal(torch.frexp(units).mantissa, torch.full((4,), 0.5))
    largest = x.abs().amax(dim=(1, 2), keepdim=True)
    bound = torch.maximum(NORMAL * x.abs(), SMALLEST * largest)
    assert bool(((restored(values, units) - x).abs() <= bound).all())


def test_an_eighth_of_the_error_of_bf16() -> None:
    x = random(2, 200, 300)
    error = float((again(x) - x).norm() / x.norm())
    coarse = float((x.bfloat16().float() - x).norm() / x.norm())
    assert coarse / error == pytest.approx(8, rel=0.05)


def test_a_power_of_two_changes_no_bit() -> None:
    x = spread(3, 16, 24)
    values, units = round_to_half(x)
    for power in (-60, -1, 1, 60):
        scaled, scaled_units = round_to_half(x * 2.0**power)
        assert torch.equal(scaled, values)
        assert torch.equal(scaled_units, units * 2.0**power)


@pytest.mark.parametrize("largest", [1.0, 1.9990, 1.9995, 1.99999])
def test_rounding_twice_is_rounding_once(largest: float) -> None:
    """Also where the largest element is rounded up to the next power of two, so that checkpoints keep all bits."""
    x = spread(2, 16, 24)
    x /= x.abs().max()
    x[:, 0, 0] = largest
    values, units = round_to_half(x)
    twice, twice_units = round_to_half(restored(values, units))
    assert torch.equal(values, twice)
    assert torch.equal(units, twice_units)


def test_numbers_at_the_ends_of_fp32() -> None:
    """Zeros, denormal numbers and the largest ones."""
    x = torch.zeros(4, 2, 3)
    x[1, 0, 0], x[1, 1, 1] = 2.0**-149, -1000 * 2.0**-149
    x[2, 0] = torch.tensor([torch.finfo(torch.float32).max, 1e37, -3e38])
    x[3, 0, 0] = torch.finfo(torch.float32).tiny
    values, units = round_to_half(x)
    assert bool(values.isfinite().all())
    result = restored(values, units)
    assert torch.equal(result[[0, 1, 3]], x[[0, 1, 3]])
    # The very largest is rounded up, beyond fp32.
    assert result[2, 0, 0] == math.inf
    torch.testing.assert_close(result[2, 0, 1:], x[2, 0, 1:], rtol=NORMAL, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_finite(value: float) -> None:
    x = random(2, 4, 6)
    x[0, 1, 2] = value
    result = again(x)
    assert not result[0].isfinite().all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("dim", [1, 2])
def test_parts_of_a_matrix_differ_in_negligible_elements_only(dim: int) -> None:
    x = spread(3, 16, 24)
    # A part whose largest element is far below the matrix's.
    x.chunk(4, dim)[2].mul_(1e-3)
    whole = again(x)
    parts = torch.cat([again(part.contiguous()) for part in x.chunk(4, dim)], dim)
    largest = x.abs().amax(dim=(1, 2), keepdim=True)
    differ = whole != parts
    assert bool((x.abs()[differ] < (largest.expand_as(x) * 2.0**-26)[differ]).all())
    assert bool(((whole - parts).abs() <= 2 * SMALLEST * largest).all())
    # Of another layout's checkpoint.
    loaded = torch.cat([again(part.contiguous()) for part in whole.chunk(2, dim)], dim)
    assert bool(((whole - loaded).abs() <= 2 * SMALLEST * largest).all())


def test_decay_is_taken_in_with_the_unit() -> None:
    values, units = round_to_half(random(3, 16, 24) * 1e-5)
    expected = restored(values, units) * MU
    assert torch.equal(restored(values, units, decay=MU), expected)
    each = torch.tensor([MU, MU, 0.0])[:, None, None]
    assert torch.equal(restored(values, units, decay=each)[:2], expected[:2])
    assert not restored(values, units, decay=each)[2].any()


def test_a_momentum_of_many_steps_has_the_error_of_three_roundings() -> None:
    """Each step keeps mu of the errors before: 1/sqrt(1 - mu^2) = 3.2 times that of one."""
    exact = torch.zeros(2, 64, 48, dtype=torch.float64)
    values, units = round_to_half(exact.float())
    for seed in range(120):
        gradient = random(2, 64, 48, seed=seed)
        exact = MU * exact + gradient
        store_(values, units, restored(values, units, decay=MU).add_(gradient))
    error = float((restored(values, units) - exact).norm() / exact.norm())
    assert 0 < error < 3.2 * NORMAL


def test_a_momentum_without_gradients_goes_on_shrinking() -> None:
    """In plain fp16 it sticks at ten times the smallest number, after 300 steps."""
    values, units = round_to_half(random(1, 16, 24))
    start = float(restored(values, units).norm())
    for _ in range(500):
        store_(values, units, restored(values, units, decay=MU))
    assert float(restored(values, units).norm()) == pytest.approx(start * MU**500, rel=0.05)
