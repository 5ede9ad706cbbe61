"""Every layout trains the model that one rank trains, and keeps its weights on their spheres."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.run_distributed import free_port, run_distributed
from tests.toy import toy_config, write_corpus

BATCH = {"global_batch_size": 16, "micro_batch_size": 4}
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
        "one-wsd": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "min_lr": 0.0},
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
ALL = [name for layouts in LAYOUTS.values() for name in layouts]


def train_all(prefix: str, folder: str, layouts: dict[str, dict[str, Any]], ports: dict[str, int]) -> None:
    from megatron_hyperp.training.pretrain import pretrain

    for name, overrides in layouts.items():
        os.environ["MASTER_PORT"] = str(ports[name])
        config = toy_config(prefix, Path(folder) / name, **BATCH, **overrides)
        pretrain(config, world_size=int(os.environ["WORLD_SIZE"]))
        gc.collect()  # process groups live on in the cycles of a dropped model, with their threads and sockets


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("layouts")
    prefix = write_corpus(folder)
    for world_size, layouts in LAYOUTS.items():
        run_distributed(train_all, world_size, prefix, str(folder), layouts, {name: free_port() for name in layouts})
    return {name: read_metrics(folder / name) for name in ALL}


def largest_difference(run: list[dict[str, Any]], reference: list[dict[str, Any]], key: str = "loss") -> float:
    assert len(run) == len(reference) == 20
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(run, reference, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2", "dp2-overlap", "dp4"),
        *("tp2-dp2", "tp2-dp2-overlap", "vpp2-dp2", "tp2-pp2"),
    ],
)
def test_layout_equals_one_rank(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert largest_difference(runs[name], runs["one"]) < tolerances.LAYOUT_LOSS
    assert largest_difference(runs[name], runs["one"], "grad_norm") < 100 * tolerances.LAYOUT_LOSS
    # Before the weights part, every parameter counted once.
    assert runs[name][0]["grad_norm"] == pytest.approx(runs["one"][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reference"),
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
)
def test_other_models_and_optimizers_equal_one_rank(
    runs: dict[str, list[dict[str, Any]]], name: str, reference: str
) -> None:
    assert largest_difference(runs[name], runs[reference]) < tolerances.LAYOUT_LOSS
    assert runs[name][0]["grad_norm"] == pytest.approx(runs[reference][0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["one-component", "one-head"])
def test_a_matrix_split_is_another_optimizer(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert largest_difference(runs[name], runs["one"]) > 10 * tolerances.LAYOUT_LOSS


def test_overlap_changes_nothing(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert largest_difference(runs["dp2-overlap"], runs["dp2"]) == 0.0


SCHEDULES: dict[str, Callable[[int], float]] = {
    # The learning rate of iteration i, counted from 0: peak 0.05, 20 iterations.
    "one": lambda i: 0.005 + 0.045 * (1 - i / 20),
    "one-cosine": lambda i: 0.01 + 0.04 * 0.5 * (1 + math.cos(math.pi * i / 20)),
    "one-wsd": lambda i: 0.05 * min(1.0, (20 - i) / 5),
    "one-warmup": lambda i: 0.05 * min(1.0, i / 4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    for iteration, row in enumerate(runs[name]):
        assert row["lr"] == pytest.approx(SCHEDULES[name](iteration), rel=1e-12), iteration


# Selective recomputation is of unfused attention.
@pytest.mark.parametrize(("name", "kept"), [("one-recompute", "one"), ("one-selective", "one-unfused")])
def test_recomputation_changes_nothing(runs: dict[str, list[dict[str, Any]]], name: str, kept: str) -> None:
    assert largest_difference(runs[name], runs[kept]) == 0.0


@pytest.mark.parametrize("name", [name for name in ALL if "muon" not in name.split("-") and "adamw" not in name])
def test_weights_stay_on_their_spheres(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    drifts = [row["radius_drift"] for row in runs[name]]
    assert max(drifts) < tolerances.RADIUS_DRIFT
    assert all(drift > 0 for drift in drifts)


@pytest.mark.parametrize(
    "name", ["one", "one-tied", "one-bf16", "dp2-bf16", "one-muonh", "one-muon", "one-adamw", "one-head"]
)
def test_every_optimizer_learns(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert runs[name][-1]["loss"] < 0.95 * runs[name][0]["loss"]
