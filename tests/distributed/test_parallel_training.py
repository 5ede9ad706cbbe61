"""Every layout trains the model that one rank trains, and keeps its weights on their spheres."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tolerances
from tests.cases import Cases, kept
from tests.toy import rows_of_run

ITERATIONS = 10
COMMON = {"global_batch_size": 16, "micro_batch_size": 4, "train_iters": ITERATIONS}
# Several buckets, so that reductions and gathers do run beside the passes.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 30000}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "one-tied": {"untie_embeddings_and_output_weights": False},
        "one-recompute": {"recompute_granularity": "full"},
        "one-unfused": {"attention_backend": "local"},
        "one-selective": {"recompute_granularity": "selective"},
        "one-bf16": {"bf16": True},
        "one-muonh": {"optimizer": "muonh"},
        "one-muon": {"optimizer": "muon"},
        "one-adamw": {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32},
        "one-cosine": {"lr_decay_style": "cosine", "min_lr": 0.01},
        "one-component": {"matrix_split": "component"},
        "one-head": {"matrix_split": "head"},
        "one-wsd": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "min_lr": 0.0},
        "one-warmup": {"lr_warmup_iters": 4, "lr_decay_style": "constant"},
    },
    2: {
        "tp2": {"tensor_model_parallel_size": 2},
        "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp2": {"pipeline_model_parallel_size": 2},
        "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        "dp2": {},
        "dp2-overlap": OVERLAP,
        "dp2-muon": {"optimizer": "muon"},
        "dp2-adamw": {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32},
        "dp2-bf16": {"bf16": True, "momentum_dtype": "bf16", **OVERLAP},
        "dp2-component": {"matrix_split": "component"},
        "tp2-component": {"tensor_model_parallel_size": 2, "matrix_split": "component"},
        "tp2-head": {"tensor_model_parallel_size": 2, "matrix_split": "head"},
        "tp2-tied": {"tensor_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
        "pp2-tied": {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
        "tp2-muon": {"tensor_model_parallel_size": 2, "optimizer": "muon"},
        "tp2-adamw": {"tensor_model_parallel_size": 2, "optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32},
    },
    4: {
        "tp2-dp2": {"tensor_model_parallel_size": 2},
        "dp4": {},
        "tp2-dp2-overlap": {"tensor_model_parallel_size": 2, "sequence_parallel": True, **OVERLAP},
        "pp2-dp2-tied": {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False, **OVERLAP},
        "vpp2-dp2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, **OVERLAP},
        "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    },
}
RUNS = {name: (ranks, fields) for ranks, layouts in LAYOUTS.items() for name, fields in layouts.items()}
# What `make test` trains: each layout and each setting once.
KEPT = {
    *LAYOUTS[1],
    *("tp2", "tp2-sp", "tp2-component", "tp2-muon", "pp2-vpp2", "pp2-tied", "dp2", "dp2-overlap", "dp2-adamw"),
    "tp2-dp2-overlap",
}


@pytest.fixture(scope="module")
def runs(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Rows of metrics by the name of a run."""

    def train(name: str, folder: Path) -> list[dict[str, Any]]:
        ranks, fields = RUNS[name]
        return rows_of_run(ranks, corpus, folder, **COMMON, **fields)

    return cases(train)


def largest_difference(run: list[dict[str, Any]], reference: list[dict[str, Any]], key: str = "loss") -> float:
    assert len(run) == len(reference) == ITERATIONS
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(run, reference, strict=True))


@pytest.mark.parametrize(
    "name",
    kept(
        [
            *("tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "dp2-overlap", "dp4"),
            *("tp2-dp2", "tp2-dp2-overlap", "vpp2-dp2", "tp2-pp2"),
        ],
        KEPT,
    ),
)
def test_layout_equals_one_rank(runs: Cases, name: str) -> None:
    assert largest_difference(runs[name], runs["one"]) < tolerances.LAYOUT_LOSS
    assert largest_difference(runs[name], runs["one"], "grad_norm") < 100 * tolerances.LAYOUT_LOSS
    # Before the weights part, every parameter counted once.
    assert runs[name][0]["grad_norm"] == pytest.approx(runs["one"][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reference"),
    kept(
        [
            ("tp2-tied", "one-tied"),
            ("pp2-tied", "one-tied"),
            ("pp2-dp2-tied", "one-tied"),
            ("tp2-muon", "one-muon"),
            ("dp2-muon", "one-muon"),
            ("tp2-adamw", "one-adamw"),
            ("dp2-adamw", "one-adamw"),
            ("dp2-component", "one-component"),
            ("tp2-component", "one-component"),
            ("tp2-head", "one-head"),
        ],
        KEPT,
    ),
)
def test_other_models_and_optimizers_equal_one_rank(runs: Cases, name: str, reference: str) -> None:
    assert largest_difference(runs[name], runs[reference]) < tolerances.LAYOUT_LOSS
    assert runs[name][0]["grad_norm"] == pytest.approx(runs[reference][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["one-component", "one-head"])
def test_a_matrix_split_is_another_optimizer(runs: Cases, name: str) -> None:
    assert largest_difference(runs[name], runs["one"]) > 10 * tolerances.LAYOUT_LOSS


def test_overlap_changes_nothing(runs: Cases) -> None:
    assert largest_difference(runs["dp2-overlap"], runs["dp2"]) == 0.0


SCHEDULES: dict[str, Callable[[int], float]] = {
    # The learning rate of iteration i, counted from 0: peak 0.05.
    "one": lambda i: 0.005 + 0.045 * (1 - i / ITERATIONS),
    "one-cosine": lambda i: 0.01 + 0.04 * 0.5 * (1 + math.cos(math.pi * i / ITERATIONS)),
    "one-wsd": lambda i: 0.05 * min(1.0, (ITERATIONS - i) / 4),
    "one-warmup": lambda i: 0.05 * min(1.0, i / 4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(runs: Cases, name: str) -> None:
    for iteration, row in enumerate(runs[name]):
        assert row["lr"] == pytest.approx(SCHEDULES[name](iteration), rel=1e-12), iteration


# Selective recomputation is of unfused attention.
@pytest.mark.parametrize(("name", "kept"), [("one-recompute", "one"), ("one-selective", "one-unfused")])
def test_recomputation_changes_nothing(runs: Cases, name: str, kept: str) -> None:
    assert largest_difference(runs[name], runs[kept]) == 0.0


@pytest.mark.parametrize(
    "name", kept([name for name in RUNS if "muon" not in name.split("-") and "adamw" not in name], KEPT)
)
def test_weights_stay_on_their_spheres(runs: Cases, name: str) -> None:
    drifts = [row["radius_drift"] for row in runs[name]]
    assert max(drifts) < tolerances.RADIUS_DRIFT
    assert all(drift > 0 for drift in drifts)


@pytest.mark.parametrize(
    "name", kept(["one", "one-tied", "one-bf16", "dp2-bf16", "one-muonh", "one-muon", "one-adamw", "one-head"], KEPT)
)
def test_every_optimizer_learns(runs: Cases, name: str) -> None:
    assert runs[name][-1]["loss"] < 0.95 * runs[name][0]["loss"]
