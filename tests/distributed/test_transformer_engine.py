"""TransformerEngine's layers: the same model as Megatron-Core's local ones.

On CPU against a stand-in (``tests/stand_ins``) under Megatron-Core's own wrappers; ``tests/gpu`` has the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests import layers, tolerances
from tests.cases import Cases, kept
from tests.layers import losses
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS

STAND_IN = "tests.stand_ins.preload_transformer_engine"
RUN = {"train_iters": 10, "stability_interval": 5, "quiet": True}
FP8 = {**RUN, "fp8_format": "hybrid"}
MODELS: layers.Cases = {
    "dense": RUN,
    "dense, recomputed": {**RUN, "recompute_granularity": "full"},
    "dense, adamw": {**RUN, "optimizer": "adamw", "lr": 0.003},
    "experts": {**RUN, **EXPERTS},
}
ROUNDED: layers.Cases = {
    "tensorwise": FP8,
    "e4m3": {**RUN, "fp8_format": "e4m3"},
    "first and last in bf16": {**FP8, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1},
    "mxfp8": {**FP8, "fp8_recipe": "mxfp8"},
    "recomputed": {**FP8, "recompute_granularity": "full"},
    "experts, tensorwise": {**FP8, **EXPERTS},
}
LAYOUTS: layers.Cases = {
    "TP2": {**RUN, "tensor_model_parallel_size": 2},
    "TP2+SP": {**RUN, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {**RUN, "pipeline_model_parallel_size": 2},
    "DP2": RUN,
    "experts, EP2": {**RUN, **EXPERTS, "expert_model_parallel_size": 2},
    "experts, TP2+SP": {**RUN, **EXPERTS, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}
GATHERED: layers.Cases = {"DP2, FP8": {**FP8, **EXPERTS, "bf16": True}}
GATHERED["DP2, FP8, gathered in FP8"] = {**GATHERED["DP2, FP8"], "fp8_param_gather": True}


def tolerance_of(title: str) -> float:
    """Of losses over ten steps, in which training amplifies another order of sums.

    Few tokens per expert make gradients of low rank, of which Newton-Schulz amplifies the rounding; Adam's first steps
    have the sign of gradients that are rounding alone.
    """
    return 2e-3 if "experts" in title or "adamw" in title else tolerances.LAYOUT_LOSS


@pytest.fixture(scope="module")
def local(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Rows of a training on Megatron-Core's own layers, where FP8 is emulated."""
    runs = {**MODELS, **{title: {**fields, "fp8_emulation": True} for title, fields in ROUNDED.items()}}

    def train(title: str, folder: Path) -> Any:
        [rows] = run_distributed(layers.train_all, 1, corpus, str(folder), {title: runs[title]}, False)
        return rows[title]

    return cases(train, "local")


@pytest.fixture(scope="module")
def other(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Rows of a training on the stand-in for TransformerEngine's, of each rank."""
    runs = {**MODELS, **ROUNDED, **LAYOUTS, **GATHERED}

    def train(title: str, folder: Path) -> Any:
        ranks, given = (2 if title in {**LAYOUTS, **GATHERED} else 1), {title: runs[title]}
        return [
            rows[title]
            for rows in run_distributed(layers.train_all, ranks, corpus, str(folder), given, True, preload=STAND_IN)
        ]

    return cases(train, "other")


@pytest.mark.parametrize("title", kept(MODELS, {"dense", "experts"}))
def test_the_same_model(title: str, local: Cases, other: Cases) -> None:
    mine, [theirs] = local[title], other[title]
    assert losses(theirs)[0] == pytest.approx(losses(mine)[0], rel=1e-6)
    assert losses(theirs) == pytest.approx(losses(mine), rel=tolerance_of(title))
    [(first, second), *_] = [(a, b) for a, b in zip(mine, theirs, strict=True) if "attention_z" in a]
    for name in ("attention_z", "output_z", "attention_rms", "mlp_rms", "angle_attention"):
        assert second[name] == pytest.approx(first[name], rel=10 * tolerance_of(title)), name


@pytest.mark.parametrize("title", kept(ROUNDED, {"tensorwise", "experts, tensorwise"}))
def test_recipes_round_as_their_emulation(title: str, local: Cases, other: Cases) -> None:
    plain = losses(local["experts" if "experts" in title else "dense"])
    mine, theirs = losses(local[title]), losses(other[title][0])
    assert theirs[0] == pytest.approx(mine[0], rel=1e-5)
    assert abs(mine[0] - plain[0]) > 10 * abs(mine[0] - theirs[0])
    # Sums that differ by 1e-7 may round to neighbours, 6% apart.
    assert theirs == pytest.approx(mine, rel=1e-2)


@pytest.mark.parametrize("title", kept(LAYOUTS, {"TP2+SP", "experts, EP2"}))
def test_layouts_agree(title: str, other: Cases) -> None:
    [alone] = other["experts" if "experts" in title else "dense"]
    for rows in other[title]:
        assert losses(rows) == pytest.approx(losses(alone), rel=tolerance_of(title))


@pytest.mark.matrix
def test_weights_that_travel_in_fp8_are_those_that_layers_round_to(other: Cases) -> None:
    rounded, gathered = ([losses(rows) for rows in other[title]] for title in GATHERED)
    assert gathered == rounded


@pytest.mark.parametrize("begins_local", kept([True, False], {True}))
def test_either_loads_the_others_checkpoints(begins_local: bool, corpus: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {"dense": {}, "experts": EXPERTS}
    run = {"train_iters": 10, "quiet": True}
    store = {name: str(tmp_path / f"{name}-store") for name in models}
    cases: layers.Cases = {}
    for name, fields in models.items():
        cases[f"{name}-whole"] = {**run, **fields}
        cases[f"{name}-first"] = {**run, **fields, "save": store[name], "exit_interval": 5}
    run_distributed(
        layers.train_and_save,
        1,
        corpus,
        str(tmp_path),
        cases,
        not begins_local,
        preload=None if begins_local else STAND_IN,
    )
    loading = {f"{name}-second": {**run, **fields, "load": store[name]} for name, fields in models.items()}
    run_distributed(
        layers.train_and_save,
        1,
        corpus,
        str(tmp_path),
        loading,
        begins_local,
        preload=STAND_IN if begins_local else None,
    )
    for name in models:
        undisturbed, resumed = (losses(read_metrics(tmp_path / f"{name}-{part}")) for part in ("whole", "second"))
        assert resumed == pytest.approx(undisturbed[5:], rel=tolerances.RESHARDED_LOSS), name


def test_recipes_are_those_asked_for(corpus: str, tmp_path: Path) -> None:
    cases = {
        "tensorwise": FP8,
        "blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "hidden_size": 128, "kv_channels": 32},
        "mxfp8": {**FP8, "fp8_recipe": "mxfp8"},
        "delayed": {**FP8, "fp8_recipe": "delayed"},
    }
    cases = {title: {**fields, "train_iters": 1} for title, fields in cases.items()}
    [found] = run_distributed(layers.recipes_entered, 1, corpus, str(tmp_path), cases, preload=STAND_IN)
    assert found == [
        ("Float8CurrentScaling", "HYBRID"),
        ("Float8BlockScaling", "E4M3"),
        ("MXFP8BlockScaling", "HYBRID"),
        ("TEDelayedScaling", "HYBRID"),
    ]
