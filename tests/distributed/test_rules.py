"""Rules under parallelism: norms are of whole matrices, however a rule lets them be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tolerances
from tests.cases import Cases
from tests.toy import EXPERTS, rows_of_run

MODEL = {"num_layers": 2, "num_query_groups": 4, "train_iters": 6, "micro_batch_size": 4, "global_batch_size": 16}
ADAMH = {**EXPERTS, "optimizer_rule": "adamh"}
NORMUON = {"optimizer": "normuonh", "matrix_split": "component"}
KINDS: dict[str, dict[str, Any]] = {
    "experts by adamh": ADAMH,
    "normuonh": NORMUON,
    "router": {**EXPERTS, "router_rule": "adamw"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
CASES = [("experts by adamh", "dp2"), ("experts by adamh", "tp2-sp"), ("normuonh", "tp2"), ("router", "dp2")]


@pytest.fixture(scope="module")
def losses(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Losses and radius drift of a kind under a layout."""

    def train(name: tuple[str, str], folder: Path) -> list[tuple[float, float]]:
        kind, layout = name
        ranks, fields = LAYOUTS[layout]
        rows = rows_of_run(ranks, corpus, folder, **MODEL, **KINDS[kind], **fields)
        return [(row["loss"], row["radius_drift"]) for row in rows if "loss" in row]

    return cases(train)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_rule_does_not_depend_on_the_layout(losses: Cases, kind: str, layout: str) -> None:
    pairs = list(zip(losses[kind, "one"], losses[kind, layout], strict=True))
    assert len(pairs) == 6
    for (expected, _), (found, drift) in pairs:
        assert found == pytest.approx(expected, rel=tolerances.LAYOUT_LOSS)
        assert drift < tolerances.RADIUS_DRIFT
