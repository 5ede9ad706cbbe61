"""The launch scripts of examples/torchrun on one node: restarts of failed ranks, stops that are no failures."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_events
from tests.functional.launch import assert_same_run, launched, train, wait_for_rows, workers, write_config
from tests.toy import toy_config, write_corpus

ITERATIONS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    toy = toy_config(write_corpus(folder), folder, num_layers=1, train_iters=ITERATIONS, save_interval=7, keep=2)
    return write_config(toy, folder / "toy.yaml")


@contextmanager
def single_node(config: Path, folder: Path, *flags: Any) -> Iterator[Popen[str]]:
    words = ["bash", "examples/torchrun/single_node.sh", str(config), *map(str, flags)]
    with launched(words, NPROC_PER_NODE=2, LAYOUT="none", RUN_DIR=folder, MAX_RESTARTS=2) as process:
        yield process


def test_killed_ranks_are_restarted_bit_for_bit(config: Path, tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    train(config, "--run-dir", straight, ranks=2)
    picked = random.Random(os.urandom(8))
    kills = sorted(picked.sample(range(1, ITERATIONS - 5), 2))
    with single_node(config, folder) as launcher:
        for rows in kills:
            wait_for_rows(folder, rows, launcher)
            picked.choice(workers(launcher)).kill()
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    # Torchrun names the rank that it saw first: the killed one, or the one that lost it.
    assert len(re.findall(r" failed \(exitcode: (-9|76)\) ", errors)) == 2, errors
    assert_same_run(folder, straight, ITERATIONS)


def test_a_stop_is_no_failure(config: Path, tmp_path: Path) -> None:
    """Torchrun would start again what leaves with another code than 0."""
    with single_node(config, tmp_path, "--exit-duration-in-mins", 0.02, "--train-iters", 100_000) as launcher:
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    kinds = [event["kind"] for event in read_events(tmp_path)]
    assert kinds[-1] == "stopped"
    assert "resumed" not in kinds
