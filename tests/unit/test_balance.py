"""Load balance over the global batch: what is counted and when, the loss, its gradient, MaxVio, the state."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_hyperp import device
from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.moe.sqrt_gate import sqrt_gate
from tests.toy import one_rank

TOKENS, EXPERTS, TOPK, LAYERS = 24, 6, 2, 3


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def _no_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core's schedules set one; another test may have."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


def draw(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and choices as the router makes them, [tokens, experts]."""
    gates, indices = sqrt_gate(logits, TOPK)
    probabilities = torch.zeros_like(logits).scatter(1, indices, gates)
    return probabilities, torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)


def attach(balance: Balance, logits: torch.Tensor, layer: int = 0) -> torch.Tensor:
    probabilities, chosen = route(logits)
    return balance.attach(probabilities, logits, chosen, layer=layer)


def switch_loss(logits: torch.Tensor) -> float:
    """E sum_i f_i P_i, token by token."""
    loads, means = [0.0] * EXPERTS, [0.0] * EXPERTS
    for row in logits.tolist():
        exponentials = torch.tensor(row, dtype=torch.float64).exp()
        for expert in range(EXPERTS):
            means[expert] += float(exponentials[expert] / exponentials.sum()) / len(logits)
        for expert in sorted(range(EXPERTS), key=row.__getitem__)[-TOPK:]:
            loads[expert] += 1 / (TOPK * len(logits))
    return EXPERTS * sum(load * mean for load, mean in zip(loads, means, strict=True))


# What counts


def counted(balance: Balance) -> float:
    balance.finish()
    return float(balance.tokens.sum())


def test_only_training_passes_count() -> None:
    balance, logits = Balance(LAYERS, EXPERTS, 0.1), draw()
    attach(balance, logits)
    assert counted(balance) == TOKENS * TOPK
    with torch.no_grad():  # evaluation, or the first pass of recomputation
        attach(balance, logits)
    assert counted(balance) == 0


def test_a_look_ahead_counts_without_gradients_and_attaches_nothing() -> None:
    balance, logits = Balance(LAYERS, EXPERTS, 0.1), draw()
    balance.looks_ahead = True
    with torch.no_grad():
        probabilities, chosen = route(logits)
        assert balance.attach(probabilities, logits, chosen, layer=0) is probabilities
    assert counted(balance) == TOKENS * TOPK


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_a_weight_of_zero_only_counts(coefficient: float) -> None:
    balance = Balance(LAYERS, EXPERTS, coefficient)
    logits = draw().requires_grad_()
    balance.shares = torch.softmax(draw(1, LAYERS), dim=-1)
    probabilities, chosen = route(logits)
    result = balance.attach(probabilities, logits, chosen, layer=0)
    assert torch.equal(result, probabilities)
    assert (result is probabilities) == (coefficient == 0)
    (0.0 * result).sum().backward()
    assert bool(logits.grad.any()) == (coefficient > 0)
    assert counted(balance) == TOKENS * TOPK


# The loss, and what follows from the counts


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_loss_is_that_of_the_whole_batch_however_it_is_cut(micro_batches: int) -> None:
    balance = Balance(LAYERS, EXPERTS, 0.1)
    batches = [draw(seed) for seed in range(LAYERS)]
    for part in range(micro_batches):
        for layer, logits in enumerate(batches):
            attach(balance, logits.chunk(micro_batches)[part], layer)
    balance.finish()
    for layer, logits in enumerate(batches):
        assert float(balance.loss[layer]) == pytest.approx(switch_loss(logits), rel=1e-12)
        counts = route(logits)[1].sum(dim=0).double()
        assert torch.equal(balance.tokens[layer], counts)
        torch.testing.assert_close(balance.shares[layer], counts / counts.sum(), rtol=1e-15, atol=0)
        squares = logits.logsumexp(dim=-1).square()
        assert float(balance.router_z[layer]) == pytest.approx(float(squares.mean()), rel=1e-12)


def test_loss_is_not_the_mean_over_micro_batches() -> None:
    """Two micro-batches, each all for one expert: balanced together, as bad as can be one by one."""
    balance = Balance(1, EXPERTS, 0.1)
    first = torch.full((TOKENS, EXPERTS), -50.0, dtype=torch.float64)
    first[:, :2] = 0.0
    for logits in (first, first.roll(2, dims=1), first.roll(4, dims=1)):
        assert switch_loss(logits) == pytest.approx(3.0)
        attach(balance, logits)
    balance.finish()
    assert float(balance.loss[0]) == pytest.approx(1.0)
    assert float(balance.max_violation()[0]) == 0.0


def test_each_batch_is_counted_anew() -> None:
    balance = Balance(1, EXPERTS, 0.1)
    for seed in (0, 1):
        attach(balance, draw(seed))
        balance.finish()
        assert float(balance.loss[0]) == pytest.approx(switch_loss(draw(seed)), rel=1e-12)


def test_max_vio_by_hand() -> None:
    balance = Balance(2, 4, 0.1)
    balance.tokens = torch.tensor([[10.0, 10.0, 10.0, 10.0], [30.0, 10.0, 0.0, 0.0]], dtype=torch.float64)
    assert balance.max_violation().tolist() == [0.0, 2.0]


def test_metrics_are_plain() -> None:
    balance = Balance(2, EXPERTS, 0.1)
    for layer in range(2):
        attach(balance, draw(layer), layer)
    balance.finish()
    metrics = balance.metrics()
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["tokens_per_expert"] == [route(draw(layer))[1].sum(dim=0).tolist() for layer in range(2)]
    expected = [max(loads) / (TOKENS * TOPK / EXPERTS) - 1 for loads in metrics["tokens_per_expert"]]
    assert metrics["max_vio_per_layer"] == pytest.approx(expected)
    assert metrics["max_vio"] == max(metrics["max_vio_per_layer"])
    squares = [draw(layer).logsumexp(dim=-1).square().mean() for layer in range(2)]
    assert metrics["router_z"] == pytest.approx(float(sum(squares)) / 2)
    assert metrics["balance_loss"] == pytest.approx((switch_loss(draw(0)) + switch_loss(draw(1))) / 2)


def test_metrics_before_the_first_batch_are_finite() -> None:
    balance = Balance(1, EXPERTS, 0.1)
    balance.finish()
    assert json.loads(json.dumps(balance.metrics(), allow_nan=False))["tokens_per_expert"] == [[0] * EXPERTS]


# The gradient


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradient_is_that_of_the_loss_with_the_shares_of_the_batch_before(micro_batches: int) -> None:
    balance = Balance(1, EXPERTS, 0.3)
    attach(balance, draw(5))
    balance.finish()
    shares = balance.shares[0].clone()
    logits = draw().requires_grad_()
    weights = draw(7)
    for part, weight in zip(logits.chunk(micro_batches), weights.chunk(micro_batches), strict=True):
        (attach(balance, part) * weight).sum().backward()
    found, logits.grad = logits.grad, None
    # The sum over tokens: the division by their number comes in finalize_model_grads.
    loss = (route(logits)[0] * weights).sum()
    loss = loss + 0.3 * EXPERTS * (shares * torch.softmax(logits, dim=-1).sum(dim=0)).sum()
    loss.backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-14)
    balance.finish()
    assert not torch.equal(balance.shares[0], shares)


def test_exact_statistics_give_the_gradient_of_the_loss_of_the_batch_itself() -> None:
    balance, logits = Balance(1, EXPERTS, 0.3), draw().requires_grad_()
    balance.looks_ahead = True
    with torch.no_grad():
        attach(balance, logits)
    balance.looks_ahead = False
    balance.finish()
    (0.0 * attach(balance, logits)).sum().backward()
    found, logits.grad = logits.grad, None
    loads = route(logits)[1].double().mean(dim=0) / TOPK
    (0.3 * EXPERTS * (loads * torch.softmax(logits, dim=-1).mean(dim=0)).sum()).backward()
    torch.testing.assert_close(found / TOKENS, logits.grad, rtol=1e-12, atol=1e-16)


def test_equal_shares_have_no_gradient() -> None:
    """What the first batch of a run starts from."""
    balance, logits = Balance(1, EXPERTS, 0.3), draw().requires_grad_()
    assert torch.equal(balance.shares, torch.full((1, EXPERTS), 1 / EXPERTS, dtype=torch.float64))
    (0.0 * attach(balance, logits)).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-16


def test_a_layer_uses_its_own_shares() -> None:
    balance = Balance(2, EXPERTS, 0.3)
    balance.shares[1] = torch.softmax(draw(3, 1)[0], dim=0)
    for layer in range(2):
        logits = draw().requires_grad_()
        (0.0 * attach(balance, logits, layer)).sum().backward()
        assert (float(logits.grad.abs().max()) > 1e-3) == (layer == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_lower_precision_keep_their_type(dtype: torch.dtype) -> None:
    balance, logits = Balance(1, EXPERTS, 0.3), draw().requires_grad_()
    probabilities, chosen = route(logits)
    result = balance.attach(probabilities.to(dtype), logits.float(), chosen, layer=0)
    assert result.dtype == dtype
    result.sum().backward()
    assert torch.isfinite(logits.grad).all()


# State


def test_state_round_trip() -> None:
    balance = Balance(LAYERS, EXPERTS, 0.1)
    for layer in range(LAYERS):
        attach(balance, draw(layer), layer)
    balance.finish()
    state = balance.state()
    assert state.device.type == "cpu"
    other = Balance(LAYERS, EXPERTS, 0.1)
    other.load(state)
    assert torch.equal(other.shares, balance.shares)
    assert (other.shares.dtype, other.shares.device) == (torch.float64, device.device())
    # What is loaded is a copy in effect: the next batch changes neither the checkpoint nor the other.
    attach(balance, draw(9))
    balance.finish()
    assert torch.equal(other.shares, state)
