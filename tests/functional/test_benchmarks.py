"""Benchmarks that start ranks themselves; they assert that ranks do what is predicted and that methods agree."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.kernels import run
from benchmarks.momentum_dtype import run as momentum_dtype
from tests.functional.launch import ROOT, run_benchmark

SCALING, STEP = "benchmarks/optimizer_scaling/run.py", "benchmarks/optimizer_step/run.py"


def counts(ranks: str, slices: str) -> list[list[str]]:
    """Rows of the table of counts."""
    command = [sys.executable, SCALING, "--measure", *ranks.split(), "--slices", *slices.split(), "--repeats", "0"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    _, *rows, last = shown.stdout.splitlines()
    assert last == f"{len(rows)} cases: counted as predicted"
    return [row.split() for row in rows]


@pytest.mark.matrix
def test_ranks_do_what_is_predicted() -> None:
    """FLOPs, bytes and collectives of two ranks, data- and tensor-parallel, dense and with experts."""
    rows = counts("2", "tiny d8")
    assert [row[:3] for row in rows] == [
        ["tiny", "2", "DP2"],
        ["tiny", "2", "TP2"],
        ["d8", "2", "DP2"],
        ["d8", "2", "TP2"],
    ]
    assert all(float(flops) > 0 and float(sent) > 0 and int(calls) > 3 for *_, flops, sent, calls in rows)


@pytest.mark.slow
def test_one_to_eight_ranks_do_what_is_predicted() -> None:
    """Of all slices; on eight ranks a team shares the heavy matrices of the deepest."""
    assert len(counts("1 2 4 8", "d8 d24 moe-d8 moe-d24 tiny")) == 5 * 7


@pytest.mark.matrix
def test_a_whole_step_runs() -> None:
    command = [sys.executable, STEP, "--whole-step", "--models", "tiny", "--tp", "2", "--dp", "1", "--repeats", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    first, header, *rows = shown.stdout.splitlines()
    assert first.startswith("tiny: ")
    assert header.split()[0] == "step"
    assert [row.split()[0] for row in rows] == [
        "auto",
        "gather",
        "all_to_all",
        "gram",
        "redundant",
        "all-reduce",
        "AdamW",
    ]


@pytest.mark.slow
def test_the_benchmark_of_kernels_runs() -> None:
    assert run_benchmark(run.main, "--parts", "step", "--repeats", 1).count("MiB") == 4


@pytest.mark.matrix
def test_momenta_in_two_bytes_are_compared() -> None:
    shown = run_benchmark(momentum_dtype.main, "--models", "dense", "--iterations", 2, "--every", 1)
    lines = [line.split("  ") for line in shown.splitlines()]
    ratios = [float(line[-1]) for line in lines if line[0] in momentum_dtype.KINDS.values() and len(line) > 8]
    assert len(ratios) == 4
    assert all(6 < ratio < 10 for ratio in ratios)
