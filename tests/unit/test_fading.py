"""Steps of matrices without gradients: how they are counted, how they fade, what a gap in the gradients changes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from megatron_hyperp.optim import AdamH, MuonH, fading
from megatron_hyperp.optim.sphere import SphereOptimizer, inner_products, move_of, step_

MU = 0.95
# Small, so that a matrix hardly turns towards the direction in which it goes on, and steps are as long as their angles.
LR = 0.002
TOLERANCE = 0.01
SHAPE = (12, 20)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(seed: int = 0) -> torch.nn.Parameter:
    weight = random(*SHAPE, seed=100 + seed)
    return torch.nn.Parameter(weight / weight.norm())


def muonh(weights: list[torch.nn.Parameter], **group: Any) -> MuonH:
    return MuonH([{"params": weights, **group}], lr=LR, momentum=MU, radius=1.0, ns_dtype=torch.float32)


def adamh(weights: list[torch.nn.Parameter], **group: Any) -> AdamH:
    return AdamH([{"params": weights, **group}], lr=LR, radius=1.0)


def moves(optimizer: SphereOptimizer, weight: torch.nn.Parameter, gradients: list[torch.Tensor | None]) -> list[float]:
    """Take a step with each gradient; return the angles by which the weight turned, as shares of a full step's."""
    turned = []
    for gradient in gradients:
        before = weight.detach().double()
        weight.grad = gradient
        optimizer.step()
        chord = float((weight.detach().double() - before).norm())
        turned.append(2 * math.asin(chord / 2) / LR)
    return turned


def zeros(count: int) -> list[torch.Tensor]:
    return [torch.zeros(SHAPE)] * count


def test_received_sees_any_element_that_is_not_zero() -> None:
    gradients = torch.zeros(5, 3, 4)
    gradients[1, 2, 3] = 1e-45
    gradients[2, 0, 0] = -1e-45
    gradients[3] = -0.0
    gradients[4, 1, 1] = math.nan
    assert fading.received(gradients).tolist() == [0, 1, 1, 0, 1]


def test_steps_are_counted_from_the_last_gradient() -> None:
    idle = torch.zeros(3, 4, 1)
    # Sums over two parts: both have something, one has, neither has.
    for expected in ([0, 0, 1], [0, 0, 2]):
        assert fading.count_idle_(idle, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)).tolist() == expected
    assert fading.count_idle_(idle, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)).tolist() == [1, 0, 0]
    assert torch.equal(idle, idle[:, :1].expand_as(idle))


def test_counts_saturate_far_beyond_rest() -> None:
    idle = torch.full((1, 2, 1), 2.0**24)
    assert fading.count_idle_(idle, torch.zeros(1)).tolist() == [2.0**24]
    assert fading.shares(idle[:, 0, 0], MU).tolist() == [0.0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, MU, 0.999])
def test_shares_are_powers_of_the_decay_down_to_rest(decay: float) -> None:
    steps = torch.arange(20_000.0)
    shares = fading.shares(steps, decay)
    expected = torch.tensor([decay**step if decay**step >= fading.REST else 0.0 for step in range(20_000)]).double()
    torch.testing.assert_close(shares, expected, rtol=1e-6, atol=0)
    assert shares[0] == 1
    assert shares[-1] == 0
    # The sum that is left out at rest.
    assert float(shares.sum()) == pytest.approx(1 / (1 - decay), rel=1e-4)


def test_shares_at_095() -> None:
    shares = fading.shares(torch.arange(1000.0), MU)
    assert float(shares[13]) == pytest.approx(0.5, abs=0.02)
    assert float(shares.sum()) == pytest.approx(20, abs=1e-4)
    assert int((shares > 0).sum()) == 325


def test_a_decay_close_to_one_has_a_table_of_bounded_length() -> None:
    shares = fading.shares(torch.tensor([0.0, 2.0**10, 2.0**21]), 1 - 1e-12)
    assert shares.tolist() == [1, pytest.approx(1), 0]


def test_bits_of_shares_do_not_depend_on_the_place_in_a_batch() -> None:
    """As those of torch.pow on CPU do."""
    steps = torch.arange(330.0)
    single = torch.cat([fading.shares(steps[k : k + 1], MU) for k in range(330)])
    assert torch.equal(fading.shares(steps, MU), single)


def test_decays_clear_momenta_at_rest_and_have_the_bits_of_a_number() -> None:
    steps = torch.tensor([0.0, 5.0, 324.0, 325.0, 1000.0])
    momenta = random(5, 4, 6)
    decayed = momenta * fading.decays(steps[:, None, None].expand(5, 4, 1), MU)
    assert torch.equal(decayed[:3], momenta[:3] * MU)
    assert not decayed[3:].any()


def test_moves_scale_with_shares() -> None:
    products = torch.tensor([[1.0, 0.0, 4.0], [1.0, 0.0, 4.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    shares = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    assert move_of(products, radii=torch.ones(3).double(), lr=0.1, shares=shares).tolist() == [0.05, 0.025, 0]


@pytest.mark.parametrize(("make", "decay"), [(muonh, MU), (adamh, 0.9)])
def test_steps_fade_as_the_momentum_does(make: Any, decay: float) -> None:
    weight = matrix()
    optimizer = make([weight])
    gradients = [random(*SHAPE, seed=seed) for seed in range(5)]
    turned = moves(optimizer, weight, [*gradients, *zeros(40)])
    assert turned[:5] == pytest.approx([1.0] * 5, abs=TOLERANCE)
    for step, share in enumerate(turned[5:], start=1):
        assert share == pytest.approx(decay**step, rel=TOLERANCE)


@pytest.mark.parametrize("make", [muonh, adamh])
def test_walking_goes_on_at_full_step(make: Any) -> None:
    weight = matrix()
    turned = moves(make([weight], zero_gradients="walk"), weight, [random(*SHAPE), *zeros(20)])
    assert turned[1:21] == pytest.approx([1.0] * 20, abs=TOLERANCE)


@pytest.mark.parametrize("gap", [1, 2])
def test_a_short_gap_changes_little_and_the_next_gradient_has_a_full_step(gap: int) -> None:
    before, after = [random(*SHAPE, seed=seed) for seed in range(10)], random(*SHAPE, seed=20)
    weights = {}
    for mode in fading.ZERO_GRADIENTS:
        weight = matrix()
        optimizer = muonh([weight], zero_gradients=mode)
        turned = moves(optimizer, weight, [*before, *zeros(gap)])
        weights[mode] = weight.detach().clone()
        assert moves(optimizer, weight, [after]) == pytest.approx([1.0], abs=TOLERANCE), mode
        assert turned[9] == pytest.approx(1.0, abs=TOLERANCE)
    missing = LR * sum(1 - MU**step for step in range(1, gap + 1))
    assert 0 < float((weights["fade"] - weights["walk"]).norm()) < 1.1 * missing


def test_after_rest_a_matrix_starts_over() -> None:
    """At rest the momentum is zero, so that a gradient then has the effect of a first one."""
    rested, fresh = matrix(), matrix()
    optimizer = muonh([rested])
    moves(optimizer, rested, [random(*SHAPE, seed=1), *zeros(400)])
    assert not optimizer.state[rested]["momentum_buffer"].any()
    with torch.no_grad():
        fresh.copy_(rested)
    for weight, made in ((rested, optimizer), (fresh, muonh([fresh]))):
        moves(made, weight, [random(*SHAPE, seed=2), random(*SHAPE, seed=3)])
    assert torch.equal(rested, fresh)


def test_matrices_of_one_family_fade_each_by_itself() -> None:
    gradients = [random(*SHAPE, seed=seed) for seed in range(6)]
    together = [matrix(0), matrix(1)]
    optimizer = muonh(together)
    for step, gradient in enumerate(gradients):
        together[0].grad = gradient
        together[1].grad = gradient if step < 3 else torch.zeros(SHAPE)
        optimizer.step()
        assert optimizer.idle_matrices() == (step >= 3)
    for seed, kept in ((0, 6), (1, 3)):
        alone = matrix(seed)
        moves(muonh([alone]), alone, [*gradients[:kept], *zeros(6 - kept)])
        torch.testing.assert_close(together[seed], alone, rtol=0, atol=1e-6)


def test_counts_survive_a_state_dict() -> None:
    gradients: list[torch.Tensor | None] = [random(*SHAPE), *zeros(20)]
    straight, resumed = matrix(), matrix()
    moves(muonh([straight]), straight, gradients)
    first = muonh([resumed])
    moves(first, resumed, gradients[:8])
    assert first.state[resumed][fading.IDLE_STEPS].shape == (SHAPE[0], 1)
    second = muonh([resumed])
    second.load_state_dict(first.state_dict())
    moves(second, resumed, gradients[8:])
    assert torch.equal(straight, resumed)


def test_a_state_dict_of_before_fading_loads() -> None:
    weight = matrix()
    first = muonh([weight])
    moves(first, weight, [random(*SHAPE)])
    old = first.state_dict()
    del old["state"][0][fading.IDLE_STEPS]
    del old["param_groups"][0]["zero_gradients"]
    second = muonh([weight])
    second.load_state_dict(old)
    assert moves(second, weight, zeros(1)) == pytest.approx([MU], rel=TOLERANCE)


def test_a_parameter_without_a_gradient_is_neither_counted_nor_moved() -> None:
    weight = matrix()
    optimizer = muonh([weight])
    moves(optimizer, weight, [random(*SHAPE)])
    assert moves(optimizer, weight, [None, None]) == [0, 0]
    assert optimizer.idle_matrices() == 0


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("zero_gradients is 'stop'; it must be 'fade' or 'walk'")):
        muonh([matrix()], zero_gradients="stop")


@pytest.mark.parametrize("dim", [1, 2])
def test_parts_of_a_matrix_decide_and_move_as_the_whole_does(dim: int) -> None:
    """The second matrix has a gradient in one part alone, the third nowhere."""
    gradients, weights = random(3, 8, 12, seed=1), random(3, 8, 12, seed=2)
    gradients[1].narrow(dim - 1, 0, 6 if dim == 1 else 9).zero_()
    gradients[2].zero_()
    directions, radii = random(3, 8, 12, seed=3), torch.ones(3, dtype=torch.float64)
    products = inner_products(weights, directions)

    def step(part: slice | None, received: torch.Tensor) -> torch.Tensor:
        """Take a step; return the weights, and what is counted in a last column."""
        of = (lambda x: x) if part is None else (lambda x: x[:, part] if dim == 1 else x[:, :, part])
        moved, idle = of(weights).clone(), torch.full((3, of(weights).shape[1], 1), 4.0)
        shares = fading.shares(fading.count_idle_(idle, received), MU)
        step_(moved, of(directions), products, radii=radii, lr=0.1, shares=shares)
        return torch.cat([moved, idle], dim=2)

    whole = step(None, fading.received(gradients))
    assert whole[:, 0, -1].tolist() == [0, 0, 5]
    cuts = [slice(0, 4), slice(4, 8)] if dim == 1 else [slice(0, 6), slice(6, 12)]
    views = [gradients[:, cut] if dim == 1 else gradients[:, :, cut] for cut in cuts]
    summed = torch.stack([fading.received(view) for view in views]).sum(dim=0)
    assert summed.tolist() == [2, 1, 0]
    parts = [step(cut, summed) for cut in cuts]
    assert torch.equal(torch.cat([part[..., :-1] for part in parts], dim), whole[..., :-1])
    for part in parts:
        assert torch.equal(part[:, 0, -1], whole[:, 0, -1])
