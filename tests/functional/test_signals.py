"""Runs that are asked to stop, through the real entry point: by signals to some of their processes, or by the clock."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_hyperp.errors import EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_STOPPED
from megatron_hyperp.training.checkpoint_folders import TRACKER
from megatron_hyperp.training.logging import read_events
from megatron_hyperp.training.signals import SECONDS_OF_ONE_REQUEST
from tests.functional.launch import assert_same_run, command, launched, run, train, wait_for_rows, workers, write_config
from tests.toy import toy_config


@pytest.fixture(scope="module")
def workspace(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    config = toy_config(corpus, folder / "unused", num_layers=1, train_iters=100)
    write_config(config, folder / "config.yaml")
    return folder


@contextmanager
def started(workspace: Path, folder: Path, *flags: Any, after: int) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks, wait until they have trained so many iterations; see that nothing is left at the end."""
    words = command(workspace / "config.yaml", "--run-dir", folder, *flags, ranks=2)
    with launched(words) as process:
        wait_for_rows(folder, after, process)
        yield process


def saving(folder: Path) -> tuple[Any, ...]:
    return "--save", folder / "checkpoints", "--load", folder / "checkpoints"


def test_signals_stop_all_ranks_and_the_run_goes_on_bit_for_bit(workspace: Path) -> None:
    straight, folder = workspace / "straight", workspace / "stopped"
    train(workspace / "config.yaml", "--run-dir", straight, ranks=2)
    # Torchrun signals a worker's whole group, the processes that load its data included. Rank 0 gets nothing.
    with started(workspace, folder, *saving(folder), "--num-workers", 1, after=3) as launcher:
        os.killpg(workers(launcher)[1].pid, signal.SIGTERM)
        _, errors = launcher.communicate(timeout=100)
    assert f"exitcode  : {EXIT_STOPPED} " in errors
    assert "Traceback" not in errors.split("torch/distributed")[0]
    first = int((folder / "checkpoints" / TRACKER).read_text())
    *_, saved, stopped = read_events(folder)
    assert (saved["kind"], saved["iteration"]) == ("saved", first)
    assert (stopped["kind"], stopped["iteration"]) == ("stopped", first)
    assert stopped["message"] == "SIGTERM (ranks that had got it: 1)"
    with started(workspace, folder, *saving(folder), after=first + 3) as launcher:
        for worker in workers(launcher):
            worker.send_signal(signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=100)
    assert f"exitcode  : {EXIT_STOPPED} " in errors
    second = int((folder / "checkpoints" / TRACKER).read_text())
    assert first < second < 100
    assert read_events(folder)[-1]["message"].startswith("SIGUSR1 ")
    train(workspace / "config.yaml", "--run-dir", folder, *saving(folder), ranks=2)
    assert_same_run(folder, straight, 100)


@pytest.mark.matrix
def test_a_second_signal_ends_a_rank_that_waits_for_another(workspace: Path) -> None:
    with started(workspace, workspace / "twice", after=1) as launcher:
        waiting, hanging = workers(launcher)
        hanging.suspend()
        waiting.send_signal(signal.SIGTERM)
        time.sleep(SECONDS_OF_ONE_REQUEST + 0.5)
        assert waiting.is_running()
        waiting.send_signal(signal.SIGTERM)
        psutil.wait_procs([waiting], timeout=20)
        hanging.resume()
        _, errors = launcher.communicate(timeout=100)
    assert "a second signal, SIGTERM: ends at once\n" in errors
    assert f"exitcode  : {128 + signal.SIGTERM} " in errors


def test_an_interrupt_of_one_process_ends_it_with_one_line(workspace: Path) -> None:
    """SIGINT to the process alone: the processes that load its data get nothing."""
    folder = workspace / "interrupted"
    words = command(workspace / "config.yaml", "--run-dir", folder, *saving(folder), "--num-workers", 2)
    with launched(words) as process:
        wait_for_rows(folder, 3, process)
        loaders = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert not psutil.wait_procs(loaders, timeout=5)[1]
    assert process.returncode == EXIT_INTERRUPTED
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert re.fullmatch(r"interrupted: after iteration [0-9]+, without a save \(SIGTERM and SIGUSR1 save first\)", line)
    assert "Traceback" not in errors
    assert len(loaders) == 2
    assert not (folder / "run.lock").exists()


def test_the_clock_stops_a_run(workspace: Path) -> None:
    folder = workspace / "clock"
    result = run(
        workspace / "config.yaml",
        *("--run-dir", folder, "--save", folder / "checkpoints", "--exit-duration-in-mins", 0.02),
        *("--train-iters", 100_000),
    )
    assert result.returncode == EXIT_STOPPED, result.stderr
    done = int((folder / "checkpoints" / TRACKER).read_text())
    event = read_events(folder)[-1]
    assert (event["kind"], event["iteration"]) == ("stopped", done)
    assert f"stopping: --exit-duration-in-mins 0.02 are over\nstopped at iteration {done} of 100000" in result.stdout


@pytest.mark.matrix
def test_a_killed_rank_ends_the_other_with_one_line(workspace: Path) -> None:
    with started(workspace, workspace / "killed", after=1) as launcher:
        workers(launcher)[1].kill()
        _, errors = launcher.communicate(timeout=100)
    (line,) = [line for line in errors.splitlines() if "error: " in line and "another rank died" in line]
    assert line.startswith("[rank 0] error: ")
    assert "Traceback" not in errors.split("torch/distributed")[0]


@pytest.mark.matrix
def test_a_stopped_rank_is_named_within_the_timeout(workspace: Path) -> None:
    flags = ("--distributed-timeout-minutes", 0.4, "--heartbeat-interval", 2)
    with started(workspace, workspace / "hanging", *flags, after=1) as launcher:
        waiting, hanging = workers(launcher)
        hanging.suspend()
        psutil.wait_procs([waiting], timeout=60)
        hanging.kill()
        _, errors = launcher.communicate(timeout=100)
    assert f"exitcode  : {EXIT_LOST_RANK} " in errors
    (line,) = [line for line in errors.splitlines() if "error: " in line and "another rank died" in line]
    assert re.search(r"^\[rank 0\] error: .* rank 1 gave its last sign [0-9]+ s ago, after iteration ", line)
