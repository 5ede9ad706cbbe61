"""The kernels of quack against PyTorch, where both can run: a Hopper or later GPU with quack-kernels installed."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.products import check_backend, gram_polynomial, symmetric_product

# Errors are judged against those of PyTorch: both accumulate in fp32 and round once, so they are of one size.
FACTOR = 2.0


def lack() -> str:
    """Why quack cannot run here; empty if it can."""
    try:
        check_backend("quack", torch.bfloat16)
    except UsageError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(lack()), reason=lack())
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device.device())


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((result.double() - exact).norm() / exact.norm())


@HALVES
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (128, 512), (256, 256), (640, 1032), (1024, 256)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products(dtype: torch.dtype, count: int, n: int, m: int, transposed: bool) -> None:
    # A tall matrix is passed on as a view of the other layout.
    x = (matrices(count, m, n).mT if transposed else matrices(count, n, m)).to(dtype) / m**0.5
    add = symmetric_product(x, x.mT)
    for beta, alpha, plus in ((1.0, 1.0, None), (0.5, -2.0, add), (3.0, 1.0, add)):
        exact = x.double() @ x.double().mT
        if plus is not None:
            exact = beta * plus.double() + alpha * exact
        errors = {}
        for backend in ("torch", "quack"):
            result = symmetric_product(x, x.mT, plus, beta=beta, alpha=alpha, backend=backend)
            assert result.dtype == dtype
            errors[backend] = error(result, exact)
        assert error(result, result.mT.double()) <= torch.finfo(dtype).eps, "both halves are written"
        assert errors["quack"] <= FACTOR * errors["torch"]


@HALVES
def test_products_of_two_symmetric_matrices(dtype: torch.dtype) -> None:
    x = matrices(2, 384, 768) / 768**0.5
    gram = (x @ x.mT).to(dtype)
    segment = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377)]
    gram /= gram.float().norm(dim=(1, 2), keepdim=True).to(dtype)
    exact = gram_polynomial(gram.double(), segment)
    errors = {backend: error(gram_polynomial(gram, segment, backend=backend), exact) for backend in ("torch", "quack")}
    assert errors["quack"] <= FACTOR * errors["torch"]


@pytest.mark.parametrize(("form", "dtype"), [("standard", torch.bfloat16), ("gram", torch.float16)])
@pytest.mark.parametrize("shape", [(4, 256, 1024), (4, 1024, 256), (3, 512, 512), (1, 1536, 3072)])
def test_newton_schulz(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = matrices(*shape)
    exact = NewtonSchulz(dtype=torch.float64, form="standard")(x.double())
    errors = {
        backend: error(NewtonSchulz(dtype=dtype, form=form, backend=backend)(x), exact)
        for backend in ("torch", "quack")
    }
    assert errors["quack"] <= FACTOR * errors["torch"]


def test_an_empty_family_stays_empty() -> None:
    x = torch.empty(0, 64, 128, device=device.device())
    assert NewtonSchulz(backend="quack")(x).shape == x.shape
