"""The benchmark of granularity, and with it what SqrtGate promises at the start, in the real blocks of a real model."""

from __future__ import annotations

import csv

import pytest

from benchmarks.moe_granularity.run import main
from benchmarks.moe_granularity.tables import slope, vertex
from tests.functional.launch import run_benchmark

# The square of a wide sum of uncorrelated terms has its expected value but for 1/sqrt(numbers that are averaged).
CONSTANT = 0.05
# Top-k gates are not quite equal: their squares sum to up to 1.15/K, which takes up to 0.03 off the slope of -1/2.
SLOPE = 0.05
# Sums of squared gates, against logits drawn from the distribution that the router's sphere implies.
GATE_SQUARES = 0.03
# Columns that are not numbers.
WORDS = ("gate", "shared")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float | str]]:
    folder = tmp_path_factory.mktemp("granularity")
    run_benchmark(main, "--quick", "--parts", "start", "--output", folder)
    assert (folder / "granularity.png").stat().st_size > 10_000
    with (folder / "start.csv").open() as stream:
        return [{k: v if k in WORDS else float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def of(rows: list[dict[str, float | str]], gate: str, shared: bool) -> list[dict[str, float | str]]:
    return [row for row in rows if row["gate"] == gate and row["shared"] == str(shared)]


@pytest.mark.parametrize("shared", [False, True])
def test_sqrt_gate_output_does_not_depend_on_topk(rows: list[dict[str, float | str]], shared: bool) -> None:
    chosen = of(rows, "sqrt", shared)
    assert [row["K"] for row in chosen] == ([4, 16] if shared else [1, 4, 16])
    for row in chosen:
        assert row["random gates"] == pytest.approx(1.0)
        assert row["random rms ratio"] == pytest.approx(1.0, abs=CONSTANT)
        assert row["rms ratio"] == pytest.approx(1.0, abs=CONSTANT)


def test_softmax_output_falls_as_the_root_of_topk(rows: list[dict[str, float | str]]) -> None:
    chosen = of(rows, "softmax", False)
    for row in chosen:
        assert row["random gates"] == pytest.approx(row["expected gates"], rel=GATE_SQUARES)
    for key in ("random rms", "rms"):
        assert slope(chosen, key) == pytest.approx(-0.5, abs=SLOPE)


def test_vertex() -> None:
    assert vertex({power: 2.0 + (power - 0.3) ** 2 for power in (-1, 0, 1, 2)}) == pytest.approx(0.3)
    assert vertex({0: 1.0, 1: 2.0}) == 0.0
