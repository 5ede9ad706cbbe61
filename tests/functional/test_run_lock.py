"""Two jobs that would write the same folders, through the real entry point."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_hyperp.errors import EXIT_USAGE
from megatron_hyperp.training.run_lock import FILE
from tests.functional.launch import assert_same_run, command, launched, run, train, wait_for_rows, write_config
from tests.toy import toy_config

ITERATIONS = 40


@pytest.fixture(scope="module")
def workspace(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locks")
    toy = toy_config(corpus, folder / "unused", num_layers=1, train_iters=ITERATIONS, save_interval=20)
    write_config(toy, folder / "config.yaml")
    return folder


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.slow
def test_the_second_job_is_refused_and_the_first_one_goes_on(workspace: Path) -> None:
    config, first, other = workspace / "config.yaml", workspace / "first", workspace / "other"
    save = ["--save", workspace / "checkpoints", "--load", workspace / "checkpoints"]
    with launched(command(config, "--run-dir", first, *save), SLURM_JOB_ID=4711) as process:
        wait_for_rows(first, 3, process)
        process.send_signal(signal.SIGSTOP)
        before = snapshot(workspace)
        same_run = run(config, "--run-dir", first, *save, ranks=2)
        same_save = run(config, "--run-dir", other, *save)
        assert snapshot(workspace) - before == {other}
        process.send_signal(signal.SIGCONT)
        assert process.wait(100) == 0
    in_use = rf"is in use by process {process.pid} on \S+ of Slurm job 4711, since .*; wait until that ends"
    # Both ranks leave alike, and rank 0 alone says why.
    assert len(re.findall(rf"^error: --run-dir {first} {in_use}", same_run.stderr, re.MULTILINE)) == 1
    assert same_run.stderr.count("in use by") == 1
    assert same_run.stderr.count(f"exitcode  : {EXIT_USAGE} ") >= 1
    assert same_save.returncode == EXIT_USAGE
    assert re.fullmatch(rf"error: --save {workspace / 'checkpoints'} {in_use}.*\n", same_save.stderr)
    assert not list(workspace.rglob(FILE))
    train(config, "--run-dir", workspace / "straight")
    assert_same_run(first, workspace / "straight", ITERATIONS)


@pytest.mark.slow
def test_a_killed_job_is_followed_at_once(workspace: Path) -> None:
    folder = workspace / "killed"
    words = command(workspace / "config.yaml", "--run-dir", folder, "--num-workers", 1)
    with launched(words) as process:
        wait_for_rows(folder, 1, process)
        process.send_signal(signal.SIGSTOP)
        assert (folder / FILE).exists()
        process.kill()
        result = subprocess.run([*words, "--train-iters", "2"], capture_output=True, text=True, timeout=200, check=True)
    assert f"was held by process {process.pid} on" in result.stderr
    assert not (folder / FILE).exists()
