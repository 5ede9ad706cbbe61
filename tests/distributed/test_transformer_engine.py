"""TransformerEngine's layers: the same model as Megatron-Core's local ones.

On CPU against a stand-in (``tests/stand_ins``) under Megatron-Core's own wrappers; ``tests/gpu`` has the real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.layers import Cases, Rows, losses, recipes_entered, train_all, train_and_save
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, write_corpus

RUN = {"train_iters": 10, "stability_interval": 5, "quiet": True}
FP8 = {**RUN, "fp8_format": "hybrid"}
MODELS: Cases = {
    "dense": RUN,
    "dense, recomputed": {**RUN, "recompute_granularity": "full"},
    "dense, adamw": {**RUN, "optimizer": "adamw", "lr": 0.003},
    "experts": {**RUN, **EXPERTS},
}
ROUNDED: Cases = {
    "tensorwise": FP8,
    "e4m3": {**RUN, "fp8_format": "e4m3"},
    "first and last in bf16": {**FP8, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1},
    "mxfp8": {**FP8, "fp8_recipe": "mxfp8"},
    "recomputed": {**FP8, "recompute_granularity": "full"},
    "experts, tensorwise": {**FP8, **EXPERTS},
}
LAYOUTS: Cases = {
    "TP2": {**RUN, "tensor_model_parallel_size": 2},
    "TP2+SP": {**RUN, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {**RUN, "pipeline_model_parallel_size": 2},
    "DP2": RUN,
    "experts, EP2": {**RUN, **EXPERTS, "expert_model_parallel_size": 2},
    "experts, TP2+SP": {**RUN, **EXPERTS, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}
GATHERED: Cases = {"DP2, FP8": {**FP8, **EXPERTS, "bf16": True}}
GATHERED["DP2, FP8, gathered in FP8"] = {**GATHERED["DP2, FP8"], "fp8_param_gather": True}


def tolerance_of(title: str) -> float:
    """Of losses over ten steps, in which training amplifies another order of sums.

    Few tokens per expert make gradients of low rank, of which Newton-Schulz amplifies the rounding; Adam's first steps
    have the sign of gradients that are rounding alone.
    """
    return 2e-3 if "experts" in title or "adamw" in title else tolerances.LAYOUT_LOSS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def local(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    emulated = {title: {**fields, "fp8_emulation": True} for title, fields in ROUNDED.items()}
    folder = str(tmp_path_factory.mktemp("local"))
    [result] = run_distributed(train_all, 1, corpus, folder, {**MODELS, **emulated}, False)
    return result


@pytest.fixture(scope="module")
def other(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = str(tmp_path_factory.mktemp("other"))
    [result] = run_distributed(train_all, 1, corpus, folder, {**MODELS, **ROUNDED}, True, fresh=True)
    return result


@pytest.mark.parametrize("title", MODELS)
def test_the_same_model(title: str, local: Rows, other: Rows) -> None:
    mine, theirs = local[title], other[title]
    assert losses(theirs)[0] == pytest.approx(losses(mine)[0], rel=1e-6)
    assert losses(theirs) == pytest.approx(losses(mine), rel=tolerance_of(title))
    [(first, second), *_] = [(a, b) for a, b in zip(mine, theirs, strict=True) if "attention_z" in a]
    for name in ("attention_z", "output_z", "attention_rms", "mlp_rms", "angle_attention"):
        assert second[name] == pytest.approx(first[name], rel=10 * tolerance_of(title)), name


@pytest.mark.parametrize("title", ROUNDED)
def test_recipes_round_as_their_emulation(title: str, local: Rows, other: Rows) -> None:
    plain = losses(local["experts" if "experts" in title else "dense"])
    mine, theirs = losses(local[title]), losses(other[title])
    assert theirs[0] == pytest.approx(mine[0], rel=1e-5)
    assert abs(mine[0] - plain[0]) > 10 * abs(mine[0] - theirs[0])
    # Sums that differ by 1e-7 may round to neighbours, 6% apart.
    assert theirs == pytest.approx(mine, rel=1e-2)


def test_layouts_agree(other: Rows, corpus: str, tmp_path: Path) -> None:
    for rank in run_distributed(train_all, 2, corpus, str(tmp_path), {**LAYOUTS, **GATHERED}, True, fresh=True):
        # Weights that travel in FP8 are those that the layers round to.
        rounded, gathered = (losses(rank.pop(title)) for title in GATHERED)
        assert gathered == rounded
        for title, rows in rank.items():
            alone = other["experts" if "experts" in title else "dense"]
            assert losses(rows) == pytest.approx(losses(alone), rel=tolerance_of(title)), title


@pytest.mark.parametrize("begins_local", [True, False])
def test_either_loads_the_others_checkpoints(begins_local: bool, corpus: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {"dense": {}, "experts": EXPERTS}
    run = {"train_iters": 10, "quiet": True}
    store = {name: str(tmp_path / f"{name}-store") for name in models}
    cases: Cases = {}
    for name, fields in models.items():
        cases[f"{name}-whole"] = {**run, **fields}
        cases[f"{name}-first"] = {**run, **fields, "save": store[name], "exit_interval": 5}
    run_distributed(train_and_save, 1, corpus, str(tmp_path), cases, not begins_local, fresh=True)
    loading = {f"{name}-second": {**run, **fields, "load": store[name]} for name, fields in models.items()}
    run_distributed(train_and_save, 1, corpus, str(tmp_path), loading, begins_local, fresh=True)
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
    [found] = run_distributed(recipes_entered, 1, corpus, str(tmp_path), cases, fresh=True)
    assert found == [
        ("Float8CurrentScaling", "HYBRID"),
        ("Float8BlockScaling", "E4M3"),
        ("MXFP8BlockScaling", "HYBRID"),
        ("TEDelayedScaling", "HYBRID"),
    ]
