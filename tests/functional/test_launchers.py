"""The launch scripts of examples/torchrun on one node: restarts of failed ranks, stops that are no failures."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from megatron_hyperp import rendezvous
from megatron_hyperp.training.logging import read_events
from tests.functional.launch import assert_same_run, launched, train, wait_for_rows, workers, write_config
from tests.run_distributed import free_port
from tests.toy import toy_config

ITERATIONS = 60


@pytest.fixture(scope="module")
def config(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    toy = toy_config(corpus, folder, num_layers=1, train_iters=ITERATIONS, save_interval=7, keep=2)
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


@pytest.mark.slow
def test_a_port_of_another_program_is_refused_in_a_minute(config: Path, tmp_path: Path) -> None:
    """One that accepts connections and sends nothing, for which torchrun waits forever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, started = taken.getsockname()[1], time.monotonic()
        settings = {"NNODES": 2, "NPROC_PER_NODE": 1, "LAYOUT": "none", "HEAD": "127.0.0.1", "PORT": port}
        words = ["bash", "examples/torchrun/multi_node.sh", str(config)]
        with launched(words, **settings, RUN_DIR=tmp_path) as process:
            _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert process.returncode == 2
    assert errors.startswith(f"error: port {port} of 127.0.0.1 is taken, and not by the job ")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_launchers_of_one_machine_meet(config: Path, tmp_path: Path) -> None:
    """Both find HEAD to be their own address; the later one finds the port taken, by the store of its job."""
    settings = {"NNODES": 2, "NPROC_PER_NODE": 1, "LAYOUT": "none", "HEAD": "127.0.0.1", "PORT": free_port()}
    settings |= {"NODE_ADDR": "127.0.0.1", "RUN_DIR": tmp_path}
    words = ["bash", "examples/torchrun/multi_node.sh", str(config), "--train-iters", "3"]
    with launched(words, **settings) as first:
        wait_for_port(settings["PORT"], first)
        with launched(words, **settings) as second:
            ends = [process.communicate(timeout=200)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends


def wait_for_port(port: int, process: Popen[str]) -> None:
    while rendezvous.is_free(port):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


@pytest.mark.matrix
def test_a_stop_is_no_failure(config: Path, tmp_path: Path) -> None:
    """Torchrun would start again what leaves with another code than 0."""
    with single_node(config, tmp_path, "--exit-duration-in-mins", 0.02, "--train-iters", 100_000) as launcher:
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    kinds = [event["kind"] for event in read_events(tmp_path)]
    assert kinds[-1] == "stopped"
    assert "resumed" not in kinds
