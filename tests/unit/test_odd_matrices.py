"""One-rank optimizers on matrices that are one row or column, rank-deficient, tied, or zero at the start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hyperp.coefficients import coefficient_schedule
from megatron_hyperp.optim import AdamH, MuonH
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from tests import tolerances

LR = 0.02
FORMS = [("standard", torch.float32), ("gram", torch.float32), ("standard", torch.bfloat16), ("gram", torch.float16)]
# Half precision: two or three digits, amplified on small singular values.
NEAR = {torch.float32: tolerances.OPTIMIZER_FP32, torch.float16: tolerances.NEWTON_SCHULZ_FP16, torch.bfloat16: 0.15}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(matrix: torch.Tensor, coefficients: str) -> torch.Tensor:
    """The polynomials applied to singular values in float64; those that are zero up to rounding are left out."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    margin = 1.01 if coefficients == "polar_express" else 1.0
    values = torch.where(values > 1e-9 * values[0], values / (margin * values.norm()), 0.0)
    for a, b, c in coefficient_schedule(coefficients, 5):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.detach().double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_one_row_or_column_is_scaled(shape: tuple[int, int], form: str, dtype: torch.dtype, coefficients: str) -> None:
    x = random(3, *shape).float()
    result = NewtonSchulz(form=form, dtype=dtype, coefficients=coefficients)(x)
    for matrix, value in zip(x, result, strict=True):
        assert relative(value, exact(matrix, coefficients)) < NEAR[dtype]
        assert float(value.norm()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_a_rank_deficient_matrix_keeps_its_rank(
    shape: tuple[int, int], rank: int, form: str, dtype: torch.dtype, coefficients: str
) -> None:
    """Half precision makes singular values of its rounding error, and the iteration makes those larger.

    By up to 490 (quintic) or 3,000: in bf16 they come near to 1, and a matrix of rank 1 turns into one of full rank.
    """
    x = (random(shape[0], rank) @ random(rank, shape[1], seed=1)).float()
    result = NewtonSchulz(form=form, dtype=dtype, coefficients=coefficients)(x).double()
    expected = exact(x, coefficients)
    limit = {torch.float32: 1e-3, torch.float16: 0.3, torch.bfloat16: 2.0}[dtype]
    assert relative(result, expected) < limit
    values = torch.linalg.svdvals(result)
    assert float(values[0]) < 1.2
    assert float(values[rank]) < min(limit, 1.0)
    # What the matrix has is kept.
    assert float((result * expected).sum() / expected.square().sum()) == pytest.approx(1.0, abs=0.05)


def reference(weight: torch.Tensor, gradients: list[torch.Tensor], radius: float) -> torch.Tensor:
    """MuonH in float64, with Nesterov momentum 0.95."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        update = exact(0.95 * momentum + gradient, "quintic")
        weight = weight - LR * radius / update.norm() * update
        weight = weight * radius / weight.norm()
    return weight


def trained(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (24, 1)])
def test_one_row_or_column_trains_like_the_reference(shape: tuple[int, int]) -> None:
    start, gradients = random(*shape, seed=9), [random(*shape, seed=seed) for seed in range(30)]
    start = start / start.norm()
    weight = torch.nn.Parameter(start.float())
    trained(MuonH([weight], lr=LR, radius=1.0, ns_dtype=torch.float32), weight, gradients)
    assert relative(weight, reference(start, gradients, 1.0)) < tolerances.OPTIMIZER_FP32


def test_gradients_of_rank_one_train_like_the_reference() -> None:
    """As those of one token."""
    shape = (12, 20)
    start = random(*shape, seed=9)
    start = start / start.norm()
    gradients = [random(12, 1, seed=seed) @ random(1, 20, seed=50 + seed) for seed in range(8)]
    weight = torch.nn.Parameter(start.float())
    trained(MuonH([weight], lr=LR, radius=1.0, ns_dtype=torch.float32), weight, gradients)
    assert relative(weight, reference(start, gradients, 1.0)) < 10 * tolerances.OPTIMIZER_FP32
    assert relative(weight, start) > LR


MAKERS: list[Any] = [
    lambda p, **kw: MuonH(p, lr=LR, ns_dtype=torch.float32, **kw),
    lambda p, **kw: AdamH(p, lr=LR, **kw),
]


@pytest.mark.parametrize("make", MAKERS, ids=["muonh", "adamh"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (24, 1), (6, 8)])
def test_a_matrix_of_zeros_is_on_its_sphere_after_one_step(make: Any, shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make([weight], radius=3.0)
    trained(optimizer, weight, [torch.zeros(shape)])
    assert not weight.any()
    trained(optimizer, weight, [random(*shape)])
    assert float(weight.detach().norm()) == pytest.approx(3.0, rel=1e-6)
    # It is the step alone.
    assert float((weight.detach() * random(*shape)).sum()) < 0


@pytest.mark.parametrize("make", MAKERS, ids=["muonh", "adamh"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_sphere_from_weights_needs_their_norm(make: Any, value: float) -> None:
    """With a radius of zero a matrix could never move."""
    with pytest.raises(ValueError, match=rf"""radius is "from-weights", but .* a matrix is {value}; give a number"""):
        make([torch.nn.Parameter(torch.full((4, 3), value))], radius="from-weights")


class Tied(torch.nn.Module):
    """An embedding that is the output layer too, around a hidden matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 6)
        self.hidden = torch.nn.Linear(6, 6, bias=False)
        self.output = torch.nn.Linear(6, 10, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.hidden(self.embedding(tokens)))
        return logits


def test_a_tied_matrix_is_updated_once_with_the_sum_of_its_gradients() -> None:
    torch.manual_seed(0)
    model = Tied()
    tokens = torch.arange(10)
    start = model.embedding.weight.detach().double()
    start = start / start.norm()
    with torch.no_grad():
        model.embedding.weight.copy_(start)
    optimizer = MuonH(model.parameters(), lr=LR, radius=1.0, ns_dtype=torch.float32)
    assert len(optimizer.param_groups[0]["params"]) == 2
    torch.nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
    assert model.embedding.weight.grad is not None
    gradient = model.embedding.weight.grad.double()
    optimizer.step()
    assert relative(model.embedding.weight, reference(start, [gradient], 1.0)) < tolerances.OPTIMIZER_FP32
    assert model.output.weight is model.embedding.weight


def test_odd_matrices_of_one_group_do_not_meet() -> None:
    """Families of every shape in one optimizer, a matrix of zeros and one without gradients among them."""
    shapes = [(1, 8), (8, 1), (1, 1), (4, 8), (8, 4), (4, 8)]
    starts = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    starts[3] = torch.zeros(4, 8, dtype=torch.float64)
    together = [torch.nn.Parameter(start.float()) for start in starts]
    optimizer = MuonH(together, lr=LR, radius=1.0, ns_dtype=torch.float32)
    for step in range(3):
        for index, weight in enumerate(together):
            known = index != 5 or step == 0
            weight.grad = random(*weight.shape, seed=step).float() if known else torch.zeros_like(weight)
        optimizer.step()
    for weight in together:
        assert np.isclose(float(weight.detach().norm()), 1.0, rtol=1e-6)
    assert optimizer.idle_matrices() == 1
