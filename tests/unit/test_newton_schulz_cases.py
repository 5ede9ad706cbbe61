"""Newton-Schulz of hard matrices, in every set and form: against float64, whatever their shape, rank and size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from benchmarks.newton_schulz.matrices import error, exact, with_spectrum
from megatron_hyperp.coefficients import SETS
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.restarts import SPECTRA
from tests import tolerances

FORMS = [("standard", torch.float32), ("gram", torch.float32), ("standard", torch.float16), ("gram", torch.float16)]
ALL_FORMS = [*FORMS, ("standard", torch.bfloat16)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def iteration(name: str, form: str, dtype: torch.dtype) -> NewtonSchulz:
    return NewtonSchulz(coefficients=name, steps=SETS[name].steps, form=form, dtype=dtype)


@pytest.mark.parametrize(("form", "dtype"), ALL_FORMS)
@pytest.mark.parametrize("name", SETS)
def test_spectra_as_momenta_have_them(name: str, form: str, dtype: torch.dtype) -> None:
    for spectrum, shape in itertools.product(SPECTRA, ((32, 32), (32, 96), (96, 32))):
        found = error(with_spectrum(spectrum, *shape), name, dtype, form)
        assert found < tolerances.NEWTON_SCHULZ_ON_SPECTRA[dtype], (spectrum, shape)


@pytest.mark.parametrize(("form", "dtype"), ALL_FORMS)
@pytest.mark.parametrize("name", SETS)
def test_one_row_or_column(name: str, form: str, dtype: torch.dtype) -> None:
    """Of rank one: a multiple of the matrix, near norm 1 and of its sign."""
    ns = iteration(name, form, dtype)
    for shape in ((1, 40), (40, 1), (1, 1), (3, 1, 17), (3, 17, 1)):
        x = normal(*shape)
        result = ns(x.float()).double()
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        factor = (result * x / size).sum(dim=(-2, -1))
        assert bool(((factor > 0.6) & (factor < 1.35)).all()), shape
        torch.testing.assert_close(
            result, factor[..., None, None] * x / size, rtol=0, atol=tolerances.NEWTON_SCHULZ_ON_SPECTRA[dtype]
        )


@pytest.mark.parametrize(("form", "dtype"), ALL_FORMS)
@pytest.mark.parametrize("name", SETS)
def test_what_has_no_full_rank(name: str, form: str, dtype: torch.dtype) -> None:
    """Where a matrix has singular values the result is right; elsewhere rounding is lifted by the slopes at 0, no more.

    In half precision that is all the way to 1 in ten steps: 2^-11 times 80,000 for deepseekv4.
    """
    ns = iteration(name, form, dtype)
    lift = math.prod(a for a, _, _ in SETS[name].schedule(SETS[name].steps))
    deficient = normal(32, 4) @ normal(4, 80)
    equal_rows = normal(1, 80).expand(32, 80).contiguous()
    orthonormal = torch.linalg.qr(normal(80, 32))[0].mT
    zero_rows = torch.cat([normal(16, 80), torch.zeros(16, 80, dtype=torch.float64)])
    for x in (deficient, equal_rows, orthonormal, zero_rows, deficient.mT):
        right, found = exact(x, name), ns(x.float()).double()
        left, values, basis = torch.linalg.svd(x, full_matrices=False)
        kept = values > 1e-9 * values.max()
        inside = left[:, kept].mT @ (found - right) @ basis[kept].mT
        assert float(inside.norm() / right.norm()) < tolerances.NEWTON_SCHULZ_RANK_DEFICIENT[dtype]
        assert float(torch.linalg.matrix_norm(found, 2)) < 1.5
        outside = float((found - right).norm() / right.norm())
        assert outside < 4 * lift * torch.finfo(dtype).eps + tolerances.NEWTON_SCHULZ_RANK_DEFICIENT[dtype]


@pytest.mark.parametrize(("form", "dtype"), ALL_FORMS)
@pytest.mark.parametrize("name", SETS)
def test_any_finite_size_equals_its_rescaled_copy(name: str, form: str, dtype: torch.dtype) -> None:
    ns = iteration(name, form, dtype)
    base = torch.randint(-1000, 1000, (3, 16, 40), generator=torch.Generator().manual_seed(0)).float()
    base[1] = 0
    expected = ns(base)
    assert not expected[1].any()
    # 1e-38 to 1e38 and down to denormal numbers: in two factors, of which each is a number in fp32.
    for power in (-149, -126, -60, 60, 117):
        scaled = base * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)
        assert torch.equal(ns(scaled), expected), power
    # A factor that is no power of two rounds the matrix itself once.
    for factor in (1e-38, 1e-20, 1e20, 1e35):
        difference = float((ns(base * factor) - expected).norm() / expected.norm())
        assert difference < tolerances.NEWTON_SCHULZ_ON_SPECTRA[dtype], factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_nothing_is_rounded_to_half_precision_before_the_normalization(
    dtype: torch.dtype, source: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first product sees each element rounded once; rounded before the division too, many would be off by more."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(NewtonSchulz, "_standard", lambda self, x: seen.append(x) or x)
    x = (1e-3 * normal(64, 160)).to(source)
    NewtonSchulz(dtype=dtype, form="standard")(x)
    (first,) = seen
    assert first.dtype == dtype
    right = x.double() / x.double().norm()
    limits = torch.finfo(dtype)
    # Half a unit in the last place, and what the division in fp32 adds; fp16 has denormal numbers below 6e-5.
    allowed = right.abs().clamp_min(limits.tiny) * (limits.eps / 2) * (1 + 2**-8)
    assert bool(((first[0].double() - right).abs() <= allowed).all())
    rounded = x.to(dtype)
    twice = (rounded / rounded.float().norm()).to(dtype)
    assert not bool(((twice.double() - right).abs() <= allowed).all())


def test_what_is_not_finite_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in itertools.product(SETS, (float("nan"), float("inf"))):
        x = normal(2, 8, 24).float()
        x[0, 3, 4] = value
        for form in ("standard", "gram"):
            result = iteration(name, form, torch.float32)(x)
            assert not bool(result[0].isfinite().all())
            assert bool(result[1].isfinite().all())


def test_cubic_steps_leave_out_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the FLOPs that are counted are the products that are done."""
    from megatron_hyperp.optim import orthogonalize, products

    counted = [0.0]
    original, long_product, fused = products.symmetric_product, torch.Tensor.__matmul__, torch.baddbmm

    def symmetric(left: torch.Tensor, right: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        before = counted[0]
        result = original(left, right, *args, **options)
        counted[0] = before + 2 * left.shape[1] * right.shape[2] * left.shape[2]
        return result

    def plain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        counted[0] += 2 * left.shape[1] * right.shape[2] * left.shape[2]
        return long_product(left, right)

    def added(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        counted[0] += 2 * left.shape[1] * right.shape[2] * left.shape[2]
        return fused(x, left, right, **options)

    monkeypatch.setattr(orthogonalize, "symmetric_product", symmetric)
    monkeypatch.setattr(products, "symmetric_product", symmetric)
    monkeypatch.setattr(torch.Tensor, "__matmul__", plain)
    monkeypatch.setattr(torch, "baddbmm", added)
    for name, form in itertools.product(SETS, ("standard", "gram")):
        counted[0] = 0.0
        ns = iteration(name, form, torch.float32)
        ns(normal(16, 64).float())
        assert counted[0] == ns.flops(16, 64, form), (name, form)
    cubic, quintic = (
        iteration(name, "standard", torch.float32).flops(64, 64, "standard") for name in ("cubic5", "quintic")
    )
    assert cubic / quintic == pytest.approx(2 / 3)
