"""Stability indicators are the same however the model is laid out, and what they say they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import Cases
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, rows_of_training, toy_config

COMMON = {"train_iters": 2, "stability_interval": 1, "num_layers": 4}
ADAMW = {"optimizer": "adamw", "lr": 0.003}
TP2 = {"tensor_model_parallel_size": 2}
TP2SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
EP2 = {"expert_model_parallel_size": 2}
# Half the micro-batch on each of two data-parallel ranks: the same tokens are sampled.
DP2 = {"micro_batch_size": 4}
RECOMPUTE = {"recompute_granularity": "full"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": EXPERTS,
    "adamw": ADAMW,
    "adamw experts": {**ADAMW, **EXPERTS},
}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"tp2": TP2, "tp2-sp": TP2SP, "pp2": PP2, "vpp2": VPP2, "dp2": DP2, "pp2-recompute": {**PP2, **RECOMPUTE}},
    "experts": {"ep2": {**EP2, **DP2}, "pp2": PP2, "dp2": DP2, "tp2-sp": TP2SP},
    "adamw": {"tp2": TP2, "dp2": DP2},
    "adamw experts": {"ep2": {**EP2, **DP2}},
}
# What `make test` trains.
KEPT = {("dense", "tp2"), ("dense", "vpp2"), ("dense", "dp2"), ("experts", "ep2"), ("experts", "tp2-sp")}


def indicators(prefix: str, folder: str, model: str, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Train for two steps; return the rows of indicators."""
    from megatron_hyperp import device
    from megatron_hyperp.training.logging import kind_of

    device.adapt_megatron()
    device.init_process_group(2)
    config = toy_config(prefix, Path(folder), **{**COMMON, **MODELS[model], **layout})
    return [row for row in rows_of_training(config) if kind_of(row) == "stability"]


@pytest.fixture(scope="module")
def alone(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Rows of indicators of a model on one rank."""
    return cases(lambda model, folder: run_distributed(indicators, 1, corpus, str(folder), model, {})[0])


def marks(model: str, layout: str) -> Any:
    if "adamw" in model:
        return pytest.mark.slow
    return () if (model, layout) in KEPT else pytest.mark.matrix


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(model, layout, marks=marks(model, layout)) for model in MODELS for layout in LAYOUTS[model]],
)
def test_every_layout_has_the_indicators_of_one_rank(
    model: str, layout: str, alone: Cases, corpus: str, tmp_path: Path
) -> None:
    # Of the first step: later ones start from weights that differ by rounding.
    expected, second = alone[model]
    assert (expected["iteration"], second["iteration"]) == (1, 2)
    for found, _ in run_distributed(indicators, 2, corpus, str(tmp_path), model, LAYOUTS[model][layout]):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            # A drift is itself rounding, and sums of different parts round differently.
            exact = {"rel": 1e-5, "abs": 1e-6 if "drift" in name else 1e-9}
            assert found[name] == pytest.approx(value, **exact), name


def test_figures_of_the_first_step(alone: Cases) -> None:
    row, _ = alone["experts"]
    layers = [name for name in row if name.endswith("_per_layer")]
    assert {len(row[name]) for name in layers} == {4}
    # At its start the output layer says next to nothing: its log-sum-exp is that of the vocabulary.
    assert row["output_z"] == pytest.approx(math.log(64) ** 2, rel=0.1)
    # Logits of some spread only add to that of equal ones.
    assert row["attention_z"] > sum(math.log(count) ** 2 for count in range(1, 65)) / 64
    assert row["router_z"] > math.log(4) ** 2
    # The residual multiplier is 1/sqrt(8).
    for name in ("attention", "mlp"):
        assert 0 < row[f"{name}_rms"] < 1
        assert 0 <= row[f"{name}_outliers"] < 0.01
    # A step of 0.05 of the radius along a direction that is nearly at right angles to the weights.
    for name in ("attention", "mlp", "experts", "router"):
        assert row[f"angle_{name}"] == pytest.approx(math.atan(0.05), rel=0.02)
        assert max(row[f"angle_{name}_per_layer"]) == row[f"angle_{name}"]
    assert max(row["radius_drift_per_layer"]) < 1e-6
    parts = [
        row[f"grad_norm_{name}"] ** 2
        for name in ("embedding", "output", "attention", "mlp", "experts", "router", "vectors")
    ]
    assert min(parts) > 0
