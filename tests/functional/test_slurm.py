"""The templates of examples/slurm on a real Slurm of two nodes: time limits, requeues, chains, arrays."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_hyperp.training.logging import read_events
from tests.functional.launch import assert_same_run, train, wait_for_rows, write_config
from tests.slurm_cluster import OPTIONS, Cluster, slurm_cluster
from tests.toy import toy_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TEMPLATE = "examples/slurm/pretrain.sbatch"
ITERATIONS = 600


@pytest.fixture(scope="module")
def config(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    toy = toy_config(corpus, folder, num_layers=1, train_iters=ITERATIONS, save_interval=100, keep=2)
    return write_config(toy, folder / "toy.yaml")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"NPROC_PER_NODE": 1, "LAYOUT": "none", "HEAD": "127.0.0.1", "NODE_ADDR": "127.0.0.1"}
    with slurm_cluster(tmp_path_factory.mktemp("cluster"), OMP_NUM_THREADS=1, **settings) as running:
        yield running


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in read_events(run)]


def test_a_job_at_its_time_limit_goes_on_bit_for_bit(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """Slurm itself signals, by the template's own ``#SBATCH`` line: 120 to 180 s before the limit of four minutes."""
    run, straight, slowed = tmp_path / "run", tmp_path / "straight", ("--train-iters", 1800, "--global-batch-size", 128)
    job = cluster.submit("--nodes=2", "--time=4", TEMPLATE, config, *slowed, RUN_DIR=run)
    cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", seconds=1200)
    assert cluster.state(job) == "COMPLETED", cluster.output(job)[-3000:]
    told = kinds(run)
    assert "stopped" in told
    assert told[told.index("stopped") + 1] == "resumed"
    assert read_events(run)[told.index("stopped")]["message"].startswith("SIGUSR1 ")
    assert "goes on in the next job" in cluster.output(job)
    train(config, "--run-dir", straight, *slowed, ranks=2, timeout=900)
    assert_same_run(run, straight)


def test_a_chain_of_jobs_ends_with_the_tokens(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    options = (*OPTIONS, "--nodes=2", f"--output={cluster.folder}/%j.log")
    said = cluster.run("bash", "examples/slurm/chain.sh", 3, *options, "--", config, RUN_DIR=run)
    first, second, third = (int(line.split()[-1]) for line in said.splitlines())
    wait_for_rows(run, 150, None)
    cluster.signal_batch(first)
    assert cluster.wait(first, "FAILED", "COMPLETED") == "FAILED"
    assert cluster.wait(second, "FAILED", "COMPLETED") == "COMPLETED"
    assert cluster.wait(third, "CANCELLED", "COMPLETED") == "CANCELLED"
    assert "stopped" in kinds(run)
    train(config, "--run-dir", straight, ranks=2)
    assert_same_run(run, straight)


def test_a_job_that_gets_no_further_stays_down(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", TEMPLATE, config, "--global-batch-size", 7, RUN_DIR=tmp_path, MAX_RESTARTS=0)
    assert cluster.wait(job, "FAILED", "COMPLETED") == "FAILED"
    output = cluster.output(job)
    assert "error: no checkpoint is newer than the one this job began with (none)" in output
    assert output.count("error: --global-batch-size 7 is not divisible") == 1, output


def test_a_cancelled_job_saves_and_stays_down(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", TEMPLATE, config, "--train-iters", 100000, RUN_DIR=tmp_path)
    wait_for_rows(tmp_path, 50, None)
    cluster.run("scancel", job)
    assert cluster.wait(job, "CANCELLED", "PENDING", "COMPLETED", "FAILED") == "CANCELLED"
    assert kinds(tmp_path)[-1] == "stopped"


def test_a_sweep_is_a_job_array(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    spec = {
        "config": str(config),
        "set": {"train_iters": 4, "eval_interval": 4, "eval_iters": 1},
        "axes": {"lr": [0.02, 0.05]},
        "blocks": [{"method": "hyperp"}, {"method": "muonh", "set": {"optimizer": "muonh"}}],
        "slurm": {"mem": 0},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(spec))
    words = ["tools/sweep.py", tmp_path / "grid.yaml", "--slurm", "--workers", 2, "--output", tmp_path / "runs"]
    said = cluster.run(sys.executable, *words)
    job = int(said.split(";")[0].split()[-1])
    for task in range(4):
        cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED")
    with (tmp_path / "runs" / "results.csv").open(newline="") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["finished"] * 4
