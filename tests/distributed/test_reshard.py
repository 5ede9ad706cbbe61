"""Checkpoints of the sharded optimizer: the same layout goes on bit for bit, any other within rounding."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.run_distributed import free_port, run_distributed
from tests.toy import toy_config, write_corpus

SAVED = {"tensor_model_parallel_size": 2}
MODEL = {"num_query_groups": 4, "train_iters": 10, "global_batch_size": 16, "micro_batch_size": 4}
# The run that saves after 5 of its 10 iterations uses TP2 x DP2; others go on from there under one of these.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "same": (4, SAVED),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "dp4": (4, {}),
    "vpp2-dp2": (4, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "component, bf16 momentum": {"matrix_split": "component", "momentum_dtype": "bf16"},
    "head, tied": {"matrix_split": "head", "untie_embeddings_and_output_weights": False},
    "adamw": {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32},
}
CASES = [
    *(("fused", layout) for layout in LAYOUTS),
    *(("component, bf16 momentum", layout) for layout in ("same", "pp2", "tp4")),
    *(("head, tied", layout) for layout in ("same", "vpp2-dp2")),
    *(("adamw", layout) for layout in ("same", "dp2")),
]


def train(prefix: str, folder: str, runs: dict[str, dict[str, Any]], ports: dict[str, int]) -> None:
    from megatron_hyperp.training.pretrain import pretrain

    for name, overrides in runs.items():
        os.environ["MASTER_PORT"] = str(ports[name])
        pretrain(
            toy_config(prefix, Path(folder) / name, **MODEL, **overrides), world_size=int(os.environ["WORLD_SIZE"])
        )
        gc.collect()  # process groups live on in the cycles of a dropped model, with their threads and sockets


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[int, float]]:
    """Return losses by iteration of every kind and run; "whole" is the uninterrupted one."""
    folder = tmp_path_factory.mktemp("reshard")
    prefix = write_corpus(folder)
    saving: dict[str, dict[str, Any]] = {}
    loading: dict[int, dict[str, dict[str, Any]]] = {}
    for kind, fields in KINDS.items():
        saving[f"{kind}/whole"] = {**SAVED, **fields, "save": str(folder / kind / "store"), "save_interval": 5}
    for kind, layout in CASES:
        size, fields = LAYOUTS[layout]
        resumed = {**fields, **KINDS[kind], "load": str(folder / kind / "store" / "iter_0000005")}
        loading.setdefault(size, {})[f"{kind}/{layout}"] = resumed
    run_distributed(train, 4, prefix, str(folder), saving, {name: free_port() for name in saving})
    for size, runs in loading.items():
        run_distributed(train, size, prefix, str(folder), runs, {name: free_port() for name in runs})
    names = [name for runs in (saving, *loading.values()) for name in runs]
    found = {}
    for name in names:
        kind, run = name.split("/")
        found[kind, run] = {row["iteration"]: row["loss"] for row in read_metrics(folder / name) if "loss" in row}
    return found


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_the_next_losses_agree_with_the_uninterrupted_run(losses: Any, kind: str, layout: str) -> None:
    whole, resumed = losses[kind, "whole"], losses[kind, layout]
    assert sorted(resumed) == [6, 7, 8, 9, 10]
    largest = max(abs(resumed[iteration] - whole[iteration]) / whole[iteration] for iteration in resumed)
    if layout == "same":
        assert largest == 0.0
    else:
        assert largest < tolerances.RESHARDED_LOSS
