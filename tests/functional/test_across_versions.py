"""Checkpoints of a mixture of experts, written under one version of Megatron-Core and resumed under another, and back.

`make test-across` sets up both environments and runs this.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.functional.launch import ENTRY, environment, write_config
from tests.run_distributed import ROOT, free_port
from tests.toy import EXPERTS, toy_config, write_corpus

# The interpreters of the environments with Megatron-Core 0.16 and with 0.19.
PYTHONS = {"old": os.environ.get("OLD_MEGATRON_PYTHON"), "new": os.environ.get("NEW_MEGATRON_PYTHON")}
SAVED, LAST = 4, 8
TP2_DP2 = (4, ["--tensor-model-parallel-size", "2", "--sequence-parallel"])
PP2 = (2, ["--pipeline-model-parallel-size", "2"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in PYTHONS.values(), reason="needs two environments: make test-across"),
]


def losses(version: str, layout: tuple[int, list[str]], config: Path, folder: Path, *flags: str) -> dict[int, float]:
    """Train under one version, and return the losses by iteration."""
    ranks, sizes = layout
    words = [str(PYTHONS[version]), "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    words += ["--master-port", str(free_port()), ENTRY, "--config", str(config), "--run-dir", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*words, *sizes, *flags],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {row["iteration"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("across")
    fields: dict[str, Any] = {**EXPERTS, "num_query_groups": 4, "train_iters": LAST, "global_batch_size": 16}
    toy = toy_config(write_corpus(folder), folder / "run", micro_batch_size=4, **fields)
    return write_config(toy, folder / "toy.yaml")


@pytest.mark.parametrize(("writer", "reader"), [("old", "new"), ("new", "old")])
@pytest.mark.timeout(1800)
def test_what_one_version_saved_the_other_resumes(config: Path, tmp_path: Path, writer: str, reader: str) -> None:
    store = tmp_path / "store"
    whole = losses(writer, TP2_DP2, config, tmp_path / "whole", "--save", str(store), "--save-interval", str(SAVED))
    assert sorted(whole) == list(range(1, LAST + 1))
    resume = ("--load", str(store / f"iter_{SAVED:07d}"))
    after = {iteration: loss for iteration, loss in whole.items() if iteration > SAVED}
    assert losses(reader, TP2_DP2, config, tmp_path / "same", *resume) == after
    other = losses(reader, PP2, config, tmp_path / "pp2", *resume)
    assert sorted(other) == sorted(after)
    assert max(abs(other[iteration] / after[iteration] - 1) for iteration in after) < tolerances.RESHARDED_LOSS
