"""The shell scripts: their syntax, what shellcheck says, what they refuse, and the commands they would run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch"), ROOT / ".ci" / "run"]
)
SINGLE, MULTI = "examples/torchrun/single_node.sh", "examples/torchrun/multi_node.sh"
JOB, CHAIN, SWEEP = "examples/slurm/pretrain.sbatch", "examples/slurm/chain.sh", "examples/slurm/sweep.sbatch"

NODE = {"NPROC_PER_NODE": 1, "NNODES": 2, "HEAD": "127.0.0.1", "LAYOUT": "none"}


def bash(*words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a script where there is neither a GPU nor Slurm."""
    kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS", "PYTHONPATH") if name in os.environ}
    environ = {**kept, "PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    environ |= {name: str(value) for name, value in settings.items()}
    return subprocess.run(["bash", *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for words in (["bash", "-n", script], [str(shellcheck), "--external-sources", script]):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([SINGLE], {"NPROC_PER_NODE": 8}, "no recipe; give one of: dense_d12 "),
        ([SINGLE, "dense_d9"], {"NPROC_PER_NODE": 8}, "there is no recipe examples/configs/dense_d9.yaml; "),
        ([SINGLE, "dense_d8"], {}, "nvidia-smi finds no GPU here; set NPROC_PER_NODE"),
        ([SINGLE, "dense_d8"], {"NPROC_PER_NODE": 8, "LAYOUT": "x.yaml"}, "there is no layout x.yaml; "),
        ([MULTI, "dense_d8"], {"NPROC_PER_NODE": 8}, "NNODES is not set; "),
        ([MULTI, "dense_d8"], {"NPROC_PER_NODE": 8, "NNODES": 2}, "HEAD is not set; "),
        ([MULTI, "dense_d8"], {**NODE, "JOIN_TIMEOUT": "long"}, "JOIN_TIMEOUT is 'long'; "),
        ([MULTI, "dense_d8"], {**NODE, "PORT": "http"}, "PORT is 'http'; it must be a whole number"),
        ([MULTI, "dense_d8"], {**NODE, "IS_HEAD": "maybe"}, "IS_HEAD is 'maybe'; "),
        ([JOB, "dense_d8"], {"NPROC_PER_NODE": 8}, "this is not a job; start it with sbatch"),
        ([CHAIN, "many", "--", "dense_d8"], {}, "the number of jobs is 'many'; "),
        ([CHAIN, "3", "--nodes", "8", "dense_d8"], {}, "no recipe; give options of sbatch, then --"),
        ([SWEEP, "tools/sweep.py"], {}, "this is no task of a job array; "),
    ],
)
def test_refusals(words: list[str], settings: dict[str, object], message: str) -> None:
    done = bash(*words, **settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_of_the_head_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = bash(MULTI, "dense_d8", **NODE, IS_HEAD=1, PORT=port, RUN_DIR="runs/a b")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(
        rf"error: port {port} of 127\.0\.0\.1 is taken, and not by the job '\w+-runs-a b'; set PORT to a free one,"
        " the same on all nodes\n",
        done.stderr,
    )


def test_dry_run_of_one_node(tmp_path: Path) -> None:
    """The layout is planned, and kept for the run; the model of 8 GPUs is built."""
    done = bash(SINGLE, "dense_d8", "--micro-batch-size", "2", NPROC_PER_NODE=8, RUN_DIR=tmp_path, DRY_RUN=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--standalone examples/pretrain_gpt.py --config examples/configs/dense_d8.yaml {tmp_path}/" in done.stdout
    assert "rank 0 of 8" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["layout_8xH100.yaml"]


@pytest.mark.matrix
def test_dry_run_of_many_nodes(tmp_path: Path) -> None:
    """What the flags say of the model is planned with: the recipe's 63 experts would divide by no such number."""
    words = (JOB, "moe_d24", "--num-experts", "64")
    job = {"NNODES": 128, "NPROC_PER_NODE": 8, "GPU": "H200", "RUN_DIR": tmp_path, "DRY_RUN": 1}
    done = bash(*words, **job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--nnodes 128 " in done.stdout
    assert "rank 1023 of 1024" in done.stdout
    assert "expert_model_parallel_size: " in (tmp_path / "layout_1024xH200.yaml").read_text()


@pytest.mark.parametrize(
    ("settings", "launch"),
    [
        ({}, "srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 bash examples/torchrun/multi_node.sh "),
        (
            {"CONTAINER_IMAGE": "a b.sqsh", "CONTAINER_MOUNTS": "/data:/data"},
            f"--container-image a\\ b.sqsh --container-workdir {ROOT}"
            f" --container-mounts {ROOT}:{ROOT}\\,/data:/data bash ",
        ),
        (
            {"APPTAINER_IMAGE": "b.sif"},
            f"--kill-on-bad-exit=1 apptainer exec --nv --pwd {ROOT} --bind {ROOT}:{ROOT} b.sif bash ",
        ),
    ],
)
def test_dry_run_of_a_job(settings: dict[str, object], launch: str, tmp_path: Path) -> None:
    """Its commands; the model is built in the dry runs above."""
    words = (JOB, "examples/configs/quickstart.yaml", "--seq-length", "64", "--global-batch-size", "256")
    job = {"NNODES": 2, "NPROC_PER_NODE": 8, "LAYOUT": "none", "RUN_DIR": tmp_path, "DRY_RUN": 1, "PYTHON": "echo"}
    done = bash(*words, **job, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert launch in done.stdout.splitlines()[0]
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HEAD:15000 " in done.stdout
    assert done.stdout.endswith(" --dry-run --world-size 16\n")
