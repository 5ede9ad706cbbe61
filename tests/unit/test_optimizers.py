"""MuonH and AdamH against independent float64 implementations, and what the sphere promises."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_hyperp.optim import AdamH, MuonH, newton_schulz
from megatron_hyperp.optim.orthogonalize import NewtonSchulz, coefficient_schedule
from megatron_hyperp.optim.sphere import adamh_radius, muonh_radius, relative_drift
from tests import tolerances

SHAPES = {"tall": (96, 32), "wide": (32, 96), "square": (64, 64), "thin": (48, 1)}
# As printed in arXiv 2603.28743's appendix and Emerging-Optimizers, typed in here once more: the reference below shares
# no line with the implementation.
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def reference_newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """X <- a X + (b A + c A^2) X in float64, A = X X^T taken on the rows whatever the shape."""
    x = matrix / np.sqrt((matrix**2).sum())
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference_muonh(
    weight: np.ndarray, gradients: list[np.ndarray], *, lr: float, momentum: float, nesterov: bool, decay: float = 0.0
) -> np.ndarray:
    radius = math.sqrt(weight.shape[0] / 3)
    buffer = np.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        update = reference_newton_schulz(momentum * buffer + gradient if nesterov else buffer)
        weight = (1 - lr * decay) * weight - lr * radius / np.sqrt((update**2).sum()) * update
        weight = weight * radius / np.sqrt((weight**2).sum())
    return weight


def gradients_of(shape: tuple[int, int], steps: int, seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for _ in range(steps)]


def initial(shape: tuple[int, int], radius: float) -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal(shape)
    return weight * radius / np.sqrt((weight**2).sum())


def parameter(values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


Steps = Iterator[list[np.ndarray]]


def train(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], gradients: Steps) -> None:
    for step_gradients in gradients:
        for weight, gradient in zip(weights, step_gradients, strict=True):
            weight.grad = torch.from_numpy(gradient).to(weight.dtype)
        optimizer.step()


def relative_difference(value: torch.Tensor, reference: np.ndarray) -> float:
    difference = value.detach().double().numpy() - reference
    return float(np.sqrt((difference**2).sum() / (reference**2).sum()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("nesterov", [True, False])
def test_muonh_equals_the_float64_reference(shape: tuple[int, int], nesterov: bool) -> None:
    start, gradients = initial(shape, math.sqrt(shape[0] / 3)), gradients_of(shape, 50)
    weight = parameter(start)
    optimizer = MuonH([weight], lr=0.02, nesterov=nesterov, ns_dtype=torch.float32)
    train(optimizer, [weight], ([gradient] for gradient in gradients))
    expected = reference_muonh(start, gradients, lr=0.02, momentum=0.95, nesterov=nesterov)
    assert relative_difference(weight, expected) < tolerances.OPTIMIZER_FP32
    assert relative_difference(weight, start) > 0.1


def test_families_of_several_shapes_equal_single_matrices() -> None:
    shapes = [(32, 16), (16, 32), (32, 16), (24, 24), (16, 32), (32, 16)]
    starts = [initial(shape, 1.0) for shape in shapes]
    gradients = [gradients_of(shape, 10, seed) for seed, shape in enumerate(shapes)]
    together = [parameter(start) for start in starts]
    optimizer = MuonH(together, lr=0.05, ns_dtype=torch.float32)
    train(optimizer, together, (list(step) for step in zip(*gradients, strict=True)))
    for start, own, weight in zip(starts, gradients, together, strict=True):
        alone = parameter(start)
        train(MuonH([alone], lr=0.05, ns_dtype=torch.float32), [alone], ([gradient] for gradient in own))
        assert relative_difference(weight, alone.detach().double().numpy()) < 1e-6


def test_parameters_without_a_gradient_stay() -> None:
    moved, still = parameter(initial((8, 4), 1.0)), parameter(initial((8, 4), 1.0))
    optimizer = MuonH([moved, still], lr=0.1, ns_dtype=torch.float32)
    before = still.detach().clone()
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(still, before)
    assert not torch.equal(moved, before)


@pytest.mark.parametrize("decay", [0.1, 2.0])
def test_weight_decay_is_a_first_order_no_op(decay: float) -> None:
    """The trajectory changes by O(lr^2 lambda): halving lr divides the change by 4 (arXiv 2603.28743)."""
    shape, steps = (48, 32), 8
    start, gradients = initial(shape, math.sqrt(shape[0] / 3)), gradients_of(shape, steps)

    def change(lr: float) -> float:
        results = []
        for lam in (0.0, decay):
            weight = parameter(start, torch.float64)
            # State and weights are fp32 inside; lr is large enough for the change to stand out of its rounding.
            optimizer = MuonH([weight], lr=lr, weight_decay=lam, ns_dtype=torch.float32)
            train(optimizer, [weight], ([gradient] for gradient in gradients))
            results.append(weight.detach().numpy())
        return float(np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0]))

    coarse, fine = change(0.02), change(0.01)
    assert coarse / fine == pytest.approx(4.0, rel=tolerances.WEIGHT_DECAY_FACTOR)


def test_weight_decay_matches_the_reference_too() -> None:
    shape = (40, 24)
    start, gradients = initial(shape, math.sqrt(shape[0] / 3)), gradients_of(shape, 20)
    weight = parameter(start)
    optimizer = MuonH([weight], lr=0.05, weight_decay=0.5, ns_dtype=torch.float32)
    train(optimizer, [weight], ([gradient] for gradient in gradients))
    expected = reference_muonh(start, gradients, lr=0.05, momentum=0.95, nesterov=True, decay=0.5)
    assert relative_difference(weight, expected) < tolerances.OPTIMIZER_FP32


def test_adamh_equals_the_float64_reference() -> None:
    shape, lr, beta1, beta2, eps, std = (60, 20), 0.03, 0.9, 0.95, 1e-8, 0.02
    radius = std * math.sqrt(shape[0] * shape[1])
    start, gradients = initial(shape, radius), gradients_of(shape, 50)
    weight = parameter(start)
    train(AdamH([weight], lr=lr, init_std=std), [weight], ([gradient] for gradient in gradients))
    expected, first, second = start, np.zeros(shape), np.zeros(shape)
    for step, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = first / (1 - beta1**step) / (np.sqrt(second / (1 - beta2**step)) + eps)
        expected = expected - lr * radius / np.sqrt((update**2).sum()) * update
        expected = expected * radius / np.sqrt((expected**2).sum())
    assert relative_difference(weight, expected) < tolerances.OPTIMIZER_FP32


@pytest.mark.matrix
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_on_the_sphere_for_two_thousand_steps(weight_dtype: torch.dtype) -> None:
    shape = (24, 40)
    weight = parameter(initial(shape, 5.0), weight_dtype)
    optimizer = MuonH([weight], lr=0.05, ns_steps=2)
    random = torch.Generator().manual_seed(0)
    for _ in range(2000):
        weight.grad = torch.randn(shape, generator=random).to(weight_dtype)
        optimizer.step()
    drift = relative_drift(weight.detach().float()[None], torch.tensor([muonh_radius(24)], dtype=torch.float64))
    # A bf16 weight is itself rounded to 3 digits; the sphere is exact for fp32 masters.
    assert float(drift) < (tolerances.RADIUS_DRIFT if weight_dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("kind", "expected"), [(MuonH, muonh_radius(12)), (AdamH, adamh_radius(12, 9, 0.02))])
def test_radius_choices(kind: type[MuonH] | type[AdamH], expected: float) -> None:
    for radius, norm in (("stateless", expected), ("from-weights", 7.0), (3.0, 3.0)):
        weight = parameter(initial((12, 9), 7.0))
        optimizer = kind([weight], lr=0.1, radius=radius)
        weight.grad = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert float(weight.detach().norm()) == pytest.approx(norm, rel=1e-6)


def test_a_zero_gradient_moves_nothing_and_makes_no_nan() -> None:
    for kind in (MuonH, AdamH):
        weight = parameter(initial((6, 5), muonh_radius(6)))
        optimizer = kind([weight], lr=0.1, radius="from-weights")
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert torch.allclose(weight, before, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_state_dict(dtype: torch.dtype) -> None:
    gradients = gradients_of((10, 8), 6)
    for make in (lambda p: MuonH(p, lr=0.1, radius="from-weights"), lambda p: AdamH(p, lr=0.1)):
        straight = parameter(initial((10, 8), 2.0), dtype)
        train(make([straight]), [straight], ([gradient] for gradient in gradients))
        resumed = parameter(initial((10, 8), 2.0), dtype)
        first = make([resumed])
        train(first, [resumed], ([gradient] for gradient in gradients[:3]))
        second = make([resumed])
        second.load_state_dict(first.state_dict())
        train(second, [resumed], ([gradient] for gradient in gradients[3:]))
        assert torch.equal(straight, resumed)


def test_initial_norm_of_kaiming_uniform_is_the_stateless_radius() -> None:
    for shape in ((256, 64), (64, 256)):
        weight = torch.empty(shape)
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
        assert float(weight.norm()) == pytest.approx(muonh_radius(shape[0]), rel=0.02)


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (3, 32, 80), (2, 80, 32), (50, 50)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...], coefficients: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = newton_schulz(x, steps=5 if coefficients == "quintic" else 8, coefficients=coefficients, dtype=torch.float32)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    values = torch.linalg.svdvals(y)
    lowest = 0.0 if shape == (50, 50) else 0.6  # a square random matrix has a singular value near 0
    assert float(values.min()) > lowest
    assert float(values.max()) < 1.4
    # The singular vectors stay: y is x times a positive function of its singular values.
    assert bool((torch.linalg.eigvalsh(0.5 * (y @ x.mT + x @ y.mT)) > -1e-3).all())


@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48)])
def test_gram_form_keeps_its_accuracy_on_spread_spectra(shape: tuple[int, int], decades: int) -> None:
    random, short = torch.Generator().manual_seed(0), min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, short, generator=random, dtype=torch.float64))[0] for n in shape)
    x = (left * torch.logspace(0, -decades, short, dtype=torch.float64)) @ right.mT
    exact = newton_schulz(x, dtype=torch.float64, form="standard")
    errors = {}
    for form in ("standard", "gram"):
        result = newton_schulz(x.float(), dtype=torch.float32, form=form).double()
        errors[form] = float((result - exact).norm() / exact.norm())
    assert errors["gram"] < 10 * errors["standard"]


def test_newton_schulz_of_a_batch_equals_single_calls_and_half_precision_is_near() -> None:
    x = torch.randn(4, 20, 60, generator=torch.Generator().manual_seed(0))
    batch = newton_schulz(x, dtype=torch.float32)
    for single, whole in zip(x, batch, strict=True):
        assert torch.allclose(newton_schulz(single, dtype=torch.float32), whole, atol=1e-5)
    assert float((newton_schulz(x) - batch).norm() / batch.norm()) < 0.05
    assert newton_schulz(x.bfloat16()).dtype == torch.bfloat16


def test_a_zero_matrix_stays_zero_beside_others() -> None:
    x = torch.stack([torch.zeros(4, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))])
    y = newton_schulz(x, dtype=torch.float32)
    assert torch.equal(y[0], torch.zeros(4, 6))
    assert bool(torch.isfinite(y).all())


def test_schedules() -> None:
    assert coefficient_schedule("quintic", 3) == tuple(QUINTIC[:3])
    assert coefficient_schedule("quintic", 7) == (*QUINTIC, QUINTIC[-1], QUINTIC[-1])
    polar = coefficient_schedule("polar_express", 9)
    assert polar[0][0] == pytest.approx(8.28721201814563 / 1.01)
    assert polar[-1] == polar[-2] == (1.875, -1.25, 0.375)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: MuonH(p, lr=0.0), "lr is 0.0"),
        (lambda p: MuonH(p, lr=float("nan")), "lr is nan"),
        (lambda p: MuonH(p, lr=0.1, momentum=1.0), "momentum is 1.0"),
        (lambda p: MuonH(p, lr=0.1, ns_steps=0), "steps is 0"),
        (lambda p: MuonH(p, lr=0.1, coefficients="cubic"), "known sets are quintic, polar_express"),
        (lambda p: MuonH(p, lr=0.1, radius="big"), "radius is 'big'"),
        (lambda p: MuonH(p, lr=0.1, radius=-1.0), "radius is -1.0"),
        (lambda p: MuonH(p, lr=0.1, weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda p: AdamH(p, lr=0.1, betas=(0.9, 1.0)), "betas are (0.9, 1.0)"),
        (lambda p: AdamH(p, lr=0.1, init_std=0.0), "init_std 0.0"),
    ],
)
def test_bad_hyperparameters_name_the_value(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make([parameter(initial((4, 4), 1.0))])  # type: ignore[operator]


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"MuonH takes matrices, got the shape \(3,\)"):
        MuonH([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"got the shape \(2,\)"):
        newton_schulz(torch.ones(2))


# Matrices of any size


def integers(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that a power of two scales exactly, in fp32 down to the smallest denormal."""
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(0)).float()


def scaled(x: torch.Tensor, power: int) -> torch.Tensor:
    """Return 2^power x; in two factors, of which each is a number in fp32."""
    return x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


FORMS = [("standard", torch.float32), ("gram", torch.float32), ("standard", torch.float16), ("gram", torch.float16)]


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize(("form", "dtype"), [*FORMS, ("standard", torch.bfloat16)])
def test_any_finite_matrix_orthogonalizes_like_its_rescaled_copy(
    form: str, dtype: torch.dtype, coefficients: str
) -> None:
    orthogonalize = NewtonSchulz(form=form, dtype=dtype, coefficients=coefficients)
    base = integers((3, 16, 40))
    base[1] = 0
    expected = orthogonalize(base)
    assert not expected[1].any()
    for power in (*range(-149, 110, 7), 117):
        assert torch.equal(orthogonalize(scaled(base, power)), expected), power
    # Of all sizes in one batch; the state in bf16, which has the range of fp32; and in fp64, which has more.
    sizes = torch.stack([scaled(base[0], power) for power in (-149, -60, 0, 117)])
    assert torch.equal(orthogonalize(sizes), expected[:1].expand_as(sizes))
    coarse = torch.randint(-128, 128, (16, 40), generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(orthogonalize(coarse * 2.0**-60 * 2.0**-73), orthogonalize(coarse))
    fine = base.double()
    for factors in ((2.0**-1000, 2.0**-74), (2.0**1000, 2.0**13)):
        assert torch.equal(orthogonalize(fine * factors[0] * factors[1]), orthogonalize(fine))


def test_hardware_that_flushes_denormals_changes_nothing() -> None:
    orthogonalize, base = NewtonSchulz(dtype=torch.float32), integers((2, 16, 40))
    expected, denormal = orthogonalize(base), scaled(base, -149)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for power in (-126, -60, 117):
            assert torch.equal(orthogonalize(scaled(base, power)), expected), power
        # To such hardware they are zeros.
        assert not orthogonalize(denormal).any()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_matrix_that_is_not_finite_does_not_look_finite(form: str) -> None:
    for value in (math.nan, math.inf):
        x = integers((2, 16, 40))
        x[0, 3, 4] = value
        result = NewtonSchulz(dtype=torch.float32, form=form)(x)
        assert not result[0].isfinite().all()
        assert result[1].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "powers"),
    # Below 1e-8 Adam's epsilon rules, so that directions are as small as gradients.
    [(MuonH, (0, -140, -100, -60, 50, 110)), (AdamH, (-80, -140, -120, -60))],
)
def test_a_step_does_not_depend_on_the_size_of_the_gradient(
    kind: type[MuonH] | type[AdamH], powers: tuple[int, ...]
) -> None:
    weights = [parameter(initial((16, 24), muonh_radius(16))) for _ in powers]
    optimizer = kind(weights, lr=0.1, radius="from-weights")
    for weight, power in zip(weights, powers, strict=True):
        weight.grad = scaled(integers((16, 24)), power)
    optimizer.step()
    for weight, power in zip(weights, powers, strict=True):
        # Products of denormal numbers are themselves rounded.
        torch.testing.assert_close(weight, weights[0], rtol=0, atol=0.02 if power == -140 else 1e-4)
        norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
        assert norm == pytest.approx(muonh_radius(16), rel=1e-6), power


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_finite_long_after_the_last_gradient(dtype: torch.dtype) -> None:
    """A dead expert's: momentum falls through the denormal numbers, the step stays the same fraction of the radius."""
    weight = parameter(initial((16, 24), muonh_radius(16)))
    optimizer = MuonH([weight], lr=0.05, ns_dtype=dtype)
    for step in range(2500):
        weight.grad = integers((16, 24)) if step < 3 else torch.zeros(16, 24)
        optimizer.step()
    assert float(optimizer.state[weight]["momentum_buffer"].abs().max()) < 1e-38
    assert float(weight.detach().norm()) == pytest.approx(muonh_radius(16), rel=1e-5)
