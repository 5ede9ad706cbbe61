"""SqrtGate: its gates, their gradients however large the logits, and what keeps the output's RMS."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.moe.layer import HyperPMoELayer
from megatron_hyperp.moe.sqrt_gate import POWERS, SqrtGateRouter, sqrt_gate, topk_gates

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")
TOKENS, EXPERTS, WIDTH = 12, 8, 4


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Gates


@pytest.mark.parametrize("topk", [1, 2, 5, EXPERTS])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_gates_are_square_roots_of_the_softmax_over_the_selected(topk: int, scale: float) -> None:
    logits = scale * draw(100, EXPERTS)
    gates, indices = sqrt_gate(logits, topk)
    assert gates.shape == indices.shape == (100, topk)
    selected = torch.gather(logits, 1, indices)
    assert torch.equal(selected, torch.topk(logits, topk).values)
    assert [len(set(row)) for row in indices.tolist()] == [topk] * 100
    probabilities = torch.softmax(selected.double(), dim=-1)
    torch.testing.assert_close(gates.double(), probabilities.sqrt(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(gates.double().square().sum(dim=-1), torch.ones(100).double(), rtol=1e-6, atol=0)


def test_gates_do_not_depend_on_a_shift_of_the_logits() -> None:
    logits = draw(100, EXPERTS, dtype=torch.float64)
    torch.testing.assert_close(sqrt_gate(logits + 1e3, 3)[0], sqrt_gate(logits, 3)[0])


def test_softmax_gates_are_the_probabilities() -> None:
    logits = draw(100, EXPERTS)
    gates, indices = topk_gates(logits, 3, POWERS["softmax"])
    torch.testing.assert_close(gates, torch.softmax(torch.gather(logits, 1, indices), dim=-1))


@pytest.mark.parametrize("topk", [0, -1, EXPERTS + 1])
def test_topk_must_fit(topk: int) -> None:
    with pytest.raises(ValueError, match=f"topk is {topk}; it must be from 1 to the number of experts, {EXPERTS}"):
        sqrt_gate(draw(2, EXPERTS), topk)


# Gradients


def jacobian(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """One token's d g_i / d l_j, i and j in the order of the gates."""
    indices = torch.topk(logits, topk).indices
    whole = torch.autograd.functional.jacobian(lambda row: sqrt_gate(row[None], topk)[0][0], logits)
    outside = [expert for expert in range(len(logits)) if expert not in indices]
    assert not whole[:, outside].any()
    return whole[:, indices]


def closed_form(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """0.5 g_i (delta_ij - p_j)."""
    probabilities = torch.softmax(torch.topk(logits.double(), topk).values, dim=-1)
    return 0.5 * probabilities.sqrt()[:, None] * (torch.eye(topk) - probabilities)


@pytest.mark.parametrize("topk", [1, 2, 7, EXPERTS])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_closed_form(topk: int, scale: float, dtype: torch.dtype) -> None:
    logits = scale * draw(EXPERTS, seed=1, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    expected = closed_form(logits, topk).to(dtype)
    torch.testing.assert_close(jacobian(logits, topk), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("topk", [1, 2, 7, EXPERTS])
def test_gradient_is_that_of_finite_differences(topk: int) -> None:
    logits = draw(5, EXPERTS, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: sqrt_gate(value, topk)[0], (logits,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("difference", [50.0, 200.0, 1e4, -1e4])
@pytest.mark.parametrize("base", [0.0, 1e4])
def test_gradients_are_finite_where_probabilities_underflow(difference: float, base: float) -> None:
    """There the gradient of sqrt(softmax) is 1/sqrt(0) times 0, not a number; of the gates it is 0."""
    logits = torch.tensor([base, base + difference, base], dtype=torch.float32)
    for topk in (1, 2, 3):
        found = jacobian(logits, topk)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), closed_form(logits, topk), rtol=1e-5, atol=1e-7)
    naive = torch.tensor([0.0, -1e4], requires_grad=True)
    torch.softmax(naive, dim=-1).sqrt().sum().backward()
    assert not torch.isfinite(naive.grad).all()


def test_one_expert_has_a_gate_of_exactly_one_and_no_gradient() -> None:
    logits = (1e3 * draw(100, EXPERTS)).requires_grad_()
    gates, indices = sqrt_gate(logits, 1)
    assert torch.equal(gates, torch.ones(100, 1))
    assert torch.equal(indices[:, 0], logits.argmax(dim=-1))
    (gates * draw(100, 1)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(100, EXPERTS))


# Output


def output_rms(topk: int, power: float) -> float:
    """RMS of sum g_i e_i over tokens and features; uncorrelated outputs of variance 1, logits of a router at start."""
    gates, _ = topk_gates(0.1 * draw(400, 8 * topk, seed=topk), topk, power)
    outputs = draw(400, topk, 100, seed=topk + 1)
    return float((gates[:, :, None] * outputs).sum(dim=1).square().mean().sqrt())


@pytest.mark.parametrize("topk", [1, 2, 4, 8, 16, 32, 64])
def test_output_does_not_depend_on_granularity(topk: int) -> None:
    assert output_rms(topk, POWERS["sqrt"]) == pytest.approx(1.0, rel=0.05)
    assert output_rms(topk, POWERS["softmax"]) == pytest.approx(1 / math.sqrt(topk), rel=0.05)


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_expert_keeps_the_variance(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    routed, own = draw(50, 4, 100), draw(50, 4, 100, seed=1)
    # Megatron-Core's part gathers what the experts made and projects nothing here.
    monkeypatch.setattr("megatron.core.transformer.moe.moe_layer.MoELayer.postprocess", lambda self, output, _: output)
    mixed = HyperPMoELayer.__new__(HyperPMoELayer).postprocess(routed, own if shared else None)
    torch.testing.assert_close(mixed, math.sqrt(0.5) * (routed + own) if shared else routed)
    assert float(mixed.square().mean().sqrt()) == pytest.approx(1.0, rel=0.05)


# Router


class Group:
    """Stands for a process group of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


def router(*, ranks: int = 1, gate: str = "sqrt", topk: int = 2, **settings: Any) -> SqrtGateRouter:
    settings = {"moe_router_load_balancing_type": "none", "moe_ffn_hidden_size": WIDTH} | settings
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=topk,
        calculate_per_token_loss=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        moe_router_pre_softmax=topk == 1,
        **settings,
    )
    group = Group(ranks)
    groups = SimpleNamespace(tp=group, cp=Group(1), tp_cp=group, tp_dp_cp=group)
    made = SqrtGateRouter(config, groups, gate=gate, balance=Balance(1, EXPERTS, 0.0))
    made.set_layer_number(1)
    return made


@pytest.mark.parametrize("gate", POWERS)
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_router_scatters_the_gates(gate: str, topk: int, training: bool) -> None:
    logits = draw(3, 4, EXPERTS)
    probabilities, chosen = router(gate=gate, topk=topk).train(training).routing(logits)
    gates, indices = topk_gates(logits.reshape(-1, EXPERTS), topk, POWERS[gate])
    assert probabilities.shape == chosen.shape == (TOKENS, EXPERTS)
    assert (chosen.sum(dim=1) == topk).all()
    assert torch.equal(torch.gather(probabilities, 1, indices), gates)
    assert not probabilities[~chosen].any()


def test_router_drops_what_is_over_capacity() -> None:
    logits = torch.zeros(TOKENS, 1, EXPERTS)
    logits[..., :2] = 5.0 + draw(TOKENS, 1, 2)
    dropping = router(moe_expert_capacity_factor=1.0)
    probabilities, chosen = dropping.routing(logits)
    # All tokens want experts 0 and 1, which take 12 * 2 / 8 = 3 each: those with the largest gates.
    assert chosen.sum(dim=0).tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    everything, _ = router().routing(logits)
    for expert in (0, 1):
        assert set(everything[:, expert].topk(3).indices.tolist()) == set(chosen[:, expert].nonzero()[:, 0].tolist())
    assert not probabilities[~chosen].any()


LOSSES = {
    "z": {"moe_z_loss_coeff": 0.25},
    **{
        name: {"moe_router_load_balancing_type": name, "moe_aux_loss_coeff": 0.25}
        for name in ("aux_loss", "seq_aux_loss", "global_aux_loss")
    },
}


def expected_loss(name: str, logits: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of the loss per token, which finalize_model_grads divides by their number."""
    sequence, batch = logits.shape[:2]
    if name == "z":
        return 0.25 * logits.logsumexp(dim=-1).square().sum()
    scores = torch.softmax(logits, dim=-1)
    loads = torch.zeros_like(scores).scatter(-1, logits.topk(2).indices, 1.0) / 2
    if name == "seq_aux_loss":
        means = (loads.mean(dim=0) * scores.mean(dim=0)).sum(dim=-1).mean()
    else:
        means = (loads.mean(dim=(0, 1)) * scores.mean(dim=(0, 1))).sum()
    return 0.25 * EXPERTS * means * sequence * batch


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_do_not_depend_on_tensor_parallelism(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor-parallel ranks hold parts of the sequence, and their gradients are summed."""
    sequence, batch = 4, 3
    logits = draw(sequence, batch, EXPERTS, dtype=torch.float64).requires_grad_()
    expected_loss(name, logits).backward()
    expected, logits.grad = logits.grad, None
    whole = torch.zeros(sequence, batch, EXPERTS).scatter(-1, logits.topk(2).indices, 1.0)

    def summed(counts: torch.Tensor, group: Group) -> torch.Tensor:
        return whole.sum(dim=(0, 1)) if len(counts) == EXPERTS else whole.sum(dim=0).flatten()

    monkeypatch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", summed)
    monkeypatch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    for part in logits.chunk(ranks):
        probabilities, _ = router(ranks=ranks, **LOSSES[name]).routing(part)
        (0.0 * probabilities).sum().backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)


def test_losses_are_for_training_alone() -> None:
    logits = draw(3, 4, EXPERTS).requires_grad_()
    made = router(moe_z_loss_coeff=1.0)
    for training, gradients in ((False, True), (True, False)):
        with torch.set_grad_enabled(gradients):
            probabilities, _ = made.train(training).routing(logits)
        if gradients:
            (0.0 * probabilities).sum().backward()
            assert not logits.grad.any()
