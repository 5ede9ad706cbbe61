"""The benchmark of FP8: its files, and the committed figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fp8.run import append, read
from benchmarks.fp8.training import CASES
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
# Of the loss without FP8.
CLOSE = 0.02


def test_rows_of_the_same_training_are_replaced(tmp_path: Path) -> None:
    row: dict[str, Any] = {"case": "none", "precision": "bf16", "seed": 1, "iterations": 2}
    append(tmp_path / "x.csv", [{**row, "kind": "a"}, {**row, "kind": "b"}])
    append(tmp_path / "x.csv", [{**row, "seed": 2, "kind": "c"}])
    append(tmp_path / "x.csv", [{**row, "kind": "d"}])
    assert [found["kind"] for found in read(tmp_path / "x.csv")] == ["c", "d"]


def test_the_results_keep_what_the_page_says() -> None:
    """The committed figures: every recipe is close, radii stay, nothing is clipped by static scales."""
    rows = read(ROOT / "benchmarks" / "fp8" / "results" / "losses.csv")
    bf16 = {
        row["case"]: row
        for row in rows
        if (row["precision"], row["seed"], row["iterations"]) == ("bf16", "1234", "200")
    }
    assert set(bf16) == set(CASES)
    for row in bf16.values():
        for name in ("loss", "held_out"):
            assert float(row[name]) == pytest.approx(float(bf16["none"][name]), rel=CLOSE)
        assert float(row["radius_drift"]) < tolerances.RADIUS_DRIFT
    for row in read(ROOT / "benchmarks" / "fp8" / "results" / "weights.csv"):
        assert float(row["sphere"]) == pytest.approx(float(row["current"]), rel=CLOSE)
        assert float(row["clipped"]) == 0.0
