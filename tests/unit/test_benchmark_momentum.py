"""The benchmark of momenta in two bytes: what it keeps, and what known spectra give."""

from __future__ import annotations

import pytest
import torch

from benchmarks.momentum_dtype.measuring import SPECTRA, Momenta, matrix_of, spectrum_row
from benchmarks.momentum_dtype.run import kind_of
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.rules.muon import momentum_


def test_momenta_are_those_of_the_optimizer() -> None:
    random = torch.Generator().manual_seed(0)
    kept = Momenta((8, 12), 0.95)
    states = {"fp32": torch.zeros(1, 8, 12), "bf16": torch.zeros(1, 8, 12, dtype=torch.bfloat16)}
    for _ in range(5):
        gradient = torch.randn(8, 12, generator=random)
        kept.add(gradient)
        for name, state in states.items():
            # Up to fused multiplications and additions, and a bit of bf16 that they change.
            expected = momentum_(state, gradient[None])
            rounding = 1e-6 if name == "fp32" else 1e-2
            torch.testing.assert_close(kept.updates[name], expected, rtol=rounding, atol=rounding)
            torch.testing.assert_close(kept.kept[name], state.float(), rtol=rounding, atol=rounding)
    changes = kept.changes(NewtonSchulz(dtype=torch.float32))
    assert {name: momentum > 0 and update > 0 for name, (momentum, update) in changes.items()} == {
        "bf16": True,
        "fp16": True,
    }


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != "Gaussian"])
def test_matrices_have_their_singular_values(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    assert values is not None
    found = torch.linalg.svdvals(matrix_of(spectrum, 12, 30).double())[0]
    torch.testing.assert_close(found, values(torch.arange(1, 13).double()), rtol=1e-3, atol=1e-7)


def test_fp16_costs_an_eighth_of_bf16_and_steep_spectra_cost_more() -> None:
    changes = {name: spectrum_row(name, 64, 64, "quintic") for name in ("Gaussian", "1/k", "1/k^2")}
    for found in changes.values():
        assert found["bf16"] / found["fp16"] == pytest.approx(8, rel=0.25)
    assert 0.001 < changes["Gaussian"]["bf16"] < changes["1/k"]["bf16"] < changes["1/k^2"]["bf16"]
    assert changes["1/k^2"]["bf16"] > 0.05


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("module.decoder.layers.3.self_attention.linear_qkv.weight", "attention, in"),
        ("module.decoder.layers.0.mlp.linear_fc2.weight", "MLP, out"),
        ("module.decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight", "expert's MLP, in"),
        ("module.decoder.layers.0.mlp.router.weight", "router"),
        ("module.embedding.word_embeddings.weight", None),
        ("module.output_layer.weight", None),
    ],
)
def test_kinds(name: str, kind: str | None) -> None:
    assert kind_of(name, torch.empty(2, 3)) == kind
    assert kind_of(name, torch.empty(2)) is None
