"""Words of users and environments that no shell runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.functional.test_scripts import JOB, MULTI, ROOT, SINGLE, bash

# Words that a shell would act on, were they ever pasted into a line of it. {} is a file that must not appear.
HOSTILE = [
    "$(touch {})",
    "`touch {}`",
    "; touch {};",
    "x\ntouch {}\n",
    "' touch {} '",
    '"; touch {} #',
    "a b && touch {}",
    "x|touch {}",
]
SMALL = ("--seq-length", "64", "--global-batch-size", "256")


@pytest.mark.parametrize("script", [MULTI, *(pytest.param(script, marks=pytest.mark.slow) for script in (SINGLE, JOB))])
def test_no_word_is_run_by_a_shell(script: str, tmp_path: Path) -> None:
    """Every setting and flag at once: they reach torchrun as they are, which the dry run prints quoted."""
    proof = tmp_path / "proof"
    words = [word.format(proof) for word in HOSTILE]
    flags = [part for word in words for part in ("--wandb-exp-name", word)]
    folder = tmp_path / "a run; $(touch proof) 'x'"
    settings = {"RUN_DIR": folder, "JOB_ID": words[0], "HEAD": words[1], "PORT": words[2], "NODE_ADDR": words[4]}
    settings |= {"JOIN_TIMEOUT": words[3], "IS_HEAD": words[5], "MAX_RESTARTS": words[6], "SHUTDOWN_TIMEOUT": words[7]}
    settings |= {"GPU": words[0], "CONTAINER_IMAGE": words[1], "CONTAINER_MOUNTS": words[2], "LAYOUT": "none"}
    settings |= {"NNODES": "2", "NPROC_PER_NODE": "8", "DRY_RUN": "1", "CHAIN": words[5]}
    done = bash(script, "examples/configs/quickstart.yaml", *SMALL, *flags, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not proof.exists()
    assert not (ROOT / "proof").exists()
    # Printed as a shell would read it back: the very words.
    line = done.stdout[: done.stdout.index("rank 0 of")]
    for word in words[:2]:
        assert (
            subprocess.run(["bash", "-c", 'printf %q "$1"', "_", word], capture_output=True, text=True).stdout in line
        )


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE", "SLURM_JOB_NUM_NODES", "SLURM_JOB_ID"])
def test_bash_reckons_with_numbers_alone(name: str, tmp_path: Path) -> None:
    """``$((NNODES * 8))`` runs what NNODES holds, if that is ``a[$(...)]``."""
    proof = tmp_path / "proof"
    settings = {"NNODES": "2", "NPROC_PER_NODE": "8", "HEAD": "x", "DRY_RUN": "1", "LAYOUT": "none"}
    settings |= {name: f"a[$(touch {proof})0]"}
    done = bash(JOB, "examples/configs/quickstart.yaml", *SMALL, **settings)
    assert not proof.exists()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "set it to a whole number" in done.stderr
