"""Checkpoints of the sharded optimizer: the same layout goes on bit for bit, any other within rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tolerances
from tests.cases import Cases, kept
from tests.run_distributed import ROOT
from tests.toy import rows_of_run

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
    "normuonh": {"optimizer": "normuonh"},
    "custom rule": {"optimizer_rule": str(ROOT / "examples" / "custom_rule.py") + ":RowBalanced"},
}
CASES = [
    *(("fused", layout) for layout in LAYOUTS),
    *(("component, bf16 momentum", layout) for layout in ("same", "pp2", "tp4")),
    *(("head, tied", layout) for layout in ("same", "vpp2-dp2")),
    *(("adamw", layout) for layout in ("same", "dp2")),
    *(("normuonh", layout) for layout in ("same", "dp4", "pp2")),
    *(("custom rule", layout) for layout in ("same", "dp4")),
]


# What `make test` trains, for each way in which state is laid out.
KEPT = {("fused", "one"), ("fused", "same"), ("fused", "pp2"), ("component, bf16 momentum", "pp2"), ("adamw", "dp2")}
KEPT |= {("normuonh", "dp4"), ("custom rule", "dp4"), ("custom rule", "same")}


@pytest.fixture(scope="module")
def losses(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Losses by iteration of a kind and a layout; the layout "whole" is the uninterrupted run."""

    def train(name: tuple[str, str], folder: Path) -> dict[int, float]:
        kind, layout = name
        if layout == "whole":
            ranks, fields = 4, {**SAVED, "save": str(folder / "store"), "save_interval": 5}
        else:
            assert made[kind, "whole"]
            ranks, fields = LAYOUTS[layout]
            fields = {**fields, "load": str(made.folder((kind, "whole")) / "store" / "iter_0000005")}
        rows = rows_of_run(ranks, corpus, folder, **MODEL, **KINDS[kind], **fields)
        return {row["iteration"]: row["loss"] for row in rows if "loss" in row}

    made = cases(train)
    return made


@pytest.mark.parametrize(("kind", "layout"), kept(CASES, KEPT))
def test_the_next_losses_agree_with_the_uninterrupted_run(losses: Cases, kind: str, layout: str) -> None:
    whole, resumed = losses[kind, "whole"], losses[kind, layout]
    assert sorted(resumed) == [6, 7, 8, 9, 10]
    largest = max(abs(resumed[iteration] - whole[iteration]) / whole[iteration] for iteration in resumed)
    if layout == "same":
        assert largest == 0.0
    else:
        assert largest < tolerances.RESHARDED_LOSS
