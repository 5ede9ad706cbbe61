"""Rounding to FP8: against torch's own casts and scaled products, saturation, scales per block, static scales."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hyperp.model.fp8 import BLOCK, SPHERE_CLIP, Scaling, quantized, sphere_scale
from megatron_hyperp.numerics.fp8 import DTYPES, LARGEST, Format, round_trip, scale_of
from megatron_hyperp.optim.sphere import muonh_radius

FORMATS: list[Format] = ["e4m3", "e5m2"]
SCALINGS: list[Scaling] = ["tensorwise", "rowwise", "blockwise", "mxfp8"]
# Half a unit in the last place: 3 and 2 bits of mantissa.
ROUNDING = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_of_the_format_stay(fmt: Format) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[fmt]).float()
    finite = every[every.isfinite()]
    assert torch.equal(round_trip(finite, fmt, torch.tensor(1.0)), finite)
    assert torch.equal(round_trip(8 * finite, fmt, torch.tensor(0.125)), 8 * finite)


@pytest.mark.parametrize("fmt", FORMATS)
def test_casts_saturate(fmt: Format) -> None:
    x = torch.tensor([1e30, -1e30, math.inf, 2 * LARGEST[fmt]])
    assert round_trip(x, fmt, torch.tensor(1.0)).tolist() == [LARGEST[fmt], -LARGEST[fmt], LARGEST[fmt], LARGEST[fmt]]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error_of_normal_numbers(fmt: Format, scaling: Scaling, dtype: torch.dtype) -> None:
    # All within a factor of 16 of the largest, so that none is subnormal.
    x = (draw(70, 200).clamp(-4, 4).sign() * (0.25 + 3.75 * torch.rand(70, 200))).to(dtype)
    rounded = quantized(x, fmt, scaling)
    assert rounded.dtype == dtype
    worst = float(((rounded.double() - x.double()) / x.double()).abs().max())
    assert worst <= ROUNDING[fmt] * 1.1
    assert worst >= ROUNDING[fmt] * 0.5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_outlier_hurts_what_shares_its_scale(scaling: Scaling) -> None:
    x = draw(256, 256)
    x[0, 0] = 1e6
    bad = (quantized(x, "e4m3", scaling) - x).abs() > 0.1 * x.abs()
    bad[0, 0] = False
    shared = {"tensorwise": (256, 256), "rowwise": (1, 256), "blockwise": (1, 128), "mxfp8": (1, 32)}[scaling]
    rows, columns = shared
    assert bad[:rows, :columns].float().mean() > 0.9
    bad[:rows, :columns] = False
    # The rest has a scale of its own: a few numbers near 0 are subnormal.
    assert bad.float().mean() < 0.01


def test_weights_have_square_blocks() -> None:
    x = draw(300, 200)
    x[0, 0] = 1e6
    bad = (quantized(x, "e4m3", "blockwise", square=True) - x).abs() > 0.1 * x.abs()
    assert bad[:128, :128].float().mean() > 0.9
    assert bad[128:].float().mean() < 0.01
    assert bad[:, 128:].float().mean() < 0.01


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_and_nothing(fmt: Format, scaling: Scaling) -> None:
    assert not quantized(torch.zeros(3, 5), fmt, scaling).any()
    assert quantized(torch.zeros(0, 5), fmt, scaling).shape == (0, 5)


def test_mxfp8_scales_are_powers_of_two() -> None:
    amax = torch.tensor([0.3, 1.0, 447.0, 448.0, 449.0, 1e-20, 0.0])
    scales = scale_of(amax, "e4m3", power_of_two=True)
    assert torch.equal(torch.log2(scales), torch.log2(scales).round())
    assert bool((scales * amax <= 448).all())
    assert bool((2 * scales * amax > 448)[:6].all())


def test_a_product_is_that_of_torchs_scaled_kernel() -> None:
    """``torch._scaled_mm`` on FP8 tensors is the product of the rounded values."""
    x, weight = draw(32, 64), draw(48, 64, seed=1)
    scales = [scale_of(item.abs().amax(), "e4m3") for item in (x, weight)]
    casts = [(item * scale).to(torch.float8_e4m3fn) for item, scale in zip((x, weight), scales, strict=True)]
    inverse = [1.0 / scale for scale in scales]
    kernel = torch._scaled_mm(casts[0], casts[1].t(), *inverse, out_dtype=torch.float32)
    ours = quantized(x, "e4m3", "tensorwise") @ quantized(weight, "e4m3", "tensorwise").t()
    torch.testing.assert_close(ours, kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (4096, 1024), (1024, 4096), (7168, 3072)])
def test_static_scales_follow_from_the_radius(shape: tuple[int, int]) -> None:
    scale = sphere_scale(shape, 1.0)
    assert math.log2(scale) == round(math.log2(scale))
    rms = muonh_radius(shape[0]) / math.sqrt(shape[0] * shape[1])
    # What is clipped is between once and twice so many times the RMS.
    assert SPHERE_CLIP <= LARGEST["e4m3"] / scale / rms < 2 * SPHERE_CLIP
    assert sphere_scale(shape, 4.0) == scale / 4


def test_static_scales_are_as_accurate_as_current_ones() -> None:
    """For weights on a sphere, Gaussian and with heavy tails; nothing is clipped."""
    for weight in (draw(512, 256), torch.distributions.StudentT(5.0).sample((512, 256))):
        weight *= muonh_radius(512) / weight.norm()
        errors = [
            float((rounded - weight).norm() / weight.norm())
            for rounded in (
                round_trip(weight, "e4m3", torch.tensor(sphere_scale((512, 256), 1.0))),
                quantized(weight, "e4m3", "tensorwise"),
            )
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.03)
        assert float(weight.abs().max()) * sphere_scale((512, 256), 1.0) < LARGEST["e4m3"]


def test_blocks_are_what_the_recipes_say() -> None:
    assert BLOCK == {"blockwise": 128, "mxfp8": 32}
