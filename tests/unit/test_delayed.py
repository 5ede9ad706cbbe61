"""Delayed scaling: the history and its scales, what counts and when, the state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from megatron_hyperp.model.delayed import ROLES, DelayedEmulation, DelayedScales
from megatron_hyperp.model.fp8 import Fp8Recipe
from megatron_hyperp.numerics.fp8 import LARGEST, round_trip
from tests.toy import one_rank

RECIPE = Fp8Recipe("e5m2")
AMAXES = [3.0, 7.0, 2.0, 1.0, 5.0, 0.5, 0.25]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def one_tensor(length: int = 1, algo: Literal["most_recent", "max"] = "most_recent", margin: int = 0) -> DelayedScales:
    return DelayedScales(RECIPE, layers=1, matrices=1, length=length, algo=algo, margin=margin)


def step(scales: DelayedScales, *amaxes: float) -> list[float]:
    """Record micro-batches' largest elements in every role; return the next step's scales."""
    for amax in amaxes:
        for role in ROLES:
            scales.record(torch.tensor([amax]), role, 0, slice(0, 1))
    scales.finish()
    return scales.scales.flatten().tolist()


def expected(amax: float, margin: int = 0) -> list[float]:
    largest = [LARGEST["e4m3"], LARGEST["e4m3"], LARGEST["e5m2"]]
    return pytest.approx([number / 2**margin / amax for number in largest])  # type: ignore[return-value]


def test_scales_are_1_at_first_and_then_of_the_last_step() -> None:
    scales = one_tensor()
    assert scales.scales.flatten().tolist() == [1.0, 1.0, 1.0]
    for amax in AMAXES:
        assert step(scales, amax) == expected(amax)


@pytest.mark.parametrize("length", [2, 3, 100])
def test_scales_of_a_history(length: int) -> None:
    scales = one_tensor(length, "max")
    for number, amax in enumerate(AMAXES):
        assert step(scales, amax) == expected(max(AMAXES[max(0, number + 1 - length) : number + 1]))


def test_margin() -> None:
    assert step(one_tensor(margin=3), 2.0) == expected(2.0, margin=3)


def test_micro_batches_of_a_step_fill_one_entry() -> None:
    scales = one_tensor(2, "max")
    assert step(scales, 1.0, 4.0, 2.0) == expected(4.0)
    assert step(scales, 3.0, 3.0) == expected(4.0)
    assert step(scales, 1.0) == expected(3.0)


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
def test_a_scale_stays_where_there_is_nothing_to_follow(nothing: float) -> None:
    scales = one_tensor()
    before = step(scales, 2.0)
    assert step(scales, nothing) == before
    assert step(scales, 8.0) == expected(8.0)


def test_scales_are_finite() -> None:
    assert all(map(math.isfinite, step(one_tensor(), 1e-45)))


@pytest.mark.parametrize("length", [2, 3, 5])
def test_state(length: int) -> None:
    scales, other = one_tensor(3, "max"), one_tensor(length, "max")
    for amax in AMAXES[:4]:
        step(scales, amax)
    other.load(scales.state())
    assert torch.equal(other.scales, scales.scales)
    # The newest entry is the running step's; the two before it are 1 and 2.
    assert step(other, 0.5) == expected(1.0 if length == 2 else 2.0)


def emulate(scales: DelayedScales) -> DelayedEmulation:
    group = dist.group.WORLD
    assert group is not None
    return DelayedEmulation(RECIPE, group, scales, layer=1, first=2, module=torch.nn.Identity())


def test_a_layer_rounds_with_the_scales_of_earlier_steps() -> None:
    scales = DelayedScales(RECIPE, layers=2, matrices=3)
    layer, x = emulate(scales), torch.tensor([[0.3, 100.0], [-1000.0, 0.7]], requires_grad=True)
    assert torch.equal(layer.input(x), round_trip(x, "e4m3", torch.tensor(1.0)))
    (layer.output(x) * torch.tensor([[1.0, 2.0], [3.0, 17.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 2.0], [3.0, 16.0]]
    scales.finish()
    assert scales.scales[:, 1, 2].tolist() == pytest.approx([0.448, 1.0, LARGEST["e5m2"] / 17])
    assert torch.equal(layer.input(x), round_trip(x, "e4m3", scales.scales[0, 1, 2]))
    # Other layers' and matrices' are untouched.
    scales.scales[:, 1, 2] = 1.0
    assert bool((scales.scales == 1.0).all())


def test_experts_have_scales_of_their_own() -> None:
    scales = DelayedScales(RECIPE, layers=2, matrices=5)
    layer, rows = emulate(scales), [1, 0, 2]
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [30.0, 40.0]])
    layer.input(x, rows)
    layer.weight(torch.tensor([[8.0]]), expert=2)
    scales.finish()
    assert scales.scales[0, 1].tolist() == pytest.approx([1.0, 1.0, 224.0, 1.0, 11.2])
    assert scales.scales[1, 1].tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 56.0])
    rounded = layer.input(x, rows)
    assert torch.equal(rounded[:1], round_trip(x[:1], "e4m3", torch.tensor(224.0)))
    assert torch.equal(rounded[1:], round_trip(x[1:], "e4m3", scales.scales[0, 1, 4]))


def test_evaluation_and_repetition_do_not_count() -> None:
    scales = DelayedScales(RECIPE, layers=2, matrices=3)
    layer, x = emulate(scales), torch.full((2, 2), 3.0)
    layer.module.eval()
    layer.input(x)
    layer.weight(x)
    assert not scales.history.any()
    layer.module.train()
    layer.input(x)
    once = scales.history.clone()
    # As recomputation does.
    layer.input(x)
    assert torch.equal(scales.history, once)
    assert once.any()
