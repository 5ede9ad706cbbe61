"""A Slurm cluster of two nodes on this machine: Debian's packages, daemons of its own, a folder that goes away."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# A job that starts in the second in which it was requeued has credentials that Slurm has just revoked, and fails.
SECONDS_TO_REVOKE = 3.0
# Of one job on both nodes; there are no GPUs to ask for.
OPTIONS = ("--gpus-per-node=0", "--exclusive=user", "--mem=0")


def install() -> None:
    """Install Slurm and munge from Debian's packages, unless they are there."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and only root on Debian can install it here")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", "-qq", *words], env=environ, check=True, capture_output=True)


class Cluster:
    """Commands of a running cluster.

    Args:
        folder: of its state, logs and the jobs' output.
        settings: environment variables of whatever is submitted.
    """

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.environ = {**os.environ, "PYTHON": sys.executable, **settings, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object, **settings: object) -> str:
        """Run a command that must succeed, and return its output."""
        environ = self.environ | {name: str(value) for name, value in settings.items()}
        done = subprocess.run(list(map(str, words)), env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: object, **settings: object) -> int:
        """Submit what the words after ``sbatch`` say; return the job's number."""
        options = (*OPTIONS, f"--output={self.folder}/%j.log")
        return int(self.run("sbatch", "--parsable", *options, *words, **settings))

    def output(self, job: int) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def state(self, job: int) -> str:
        """State of a job, such as RUNNING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: int, *states: str, seconds: float = 240) -> str:
        """Wait until a job is in one of the states, beginning soon whenever it is requeued; return which."""
        deadline = time.monotonic() + seconds
        running = time.monotonic()
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}:\n{self.output(job)[-3000:]}"
            if state != "PENDING":
                running = time.monotonic()
            elif time.monotonic() > running + SECONDS_TO_REVOKE:
                # Slurm lets a requeued job wait for two minutes.
                subprocess.run(
                    ["scontrol", "update", f"JobId={job}", "StartTime=now"],
                    env=self.environ,
                    capture_output=True,
                    check=False,
                )
            time.sleep(0.5)
        return state

    def signal_batch(self, job: int) -> None:
        """Signal the batch shell, as Slurm does before the time limit."""
        self.run("scancel", "--batch", "--signal=USR1", job)


@contextmanager
def slurm_cluster(folder: Path, **settings: object) -> Iterator[Cluster]:
    """Start the daemons; stop them at the end."""
    install()
    host, port = socket.gethostname(), 17800 + os.getpid() % 1000
    text = CONFIG.format(folder=folder, host=host, port=port, first=port + 1000, second=port + 1001)
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force"], check=True, capture_output=True)
    cluster = Cluster(folder, {name: str(value) for name, value in settings.items()})
    try:
        cluster.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            cluster.run("slurmd", "-N", node)
        deadline = time.monotonic() + 30
        while cluster.run("sinfo", "--noheader", "--format=%T %D").strip() != "idle 2":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield cluster
    finally:
        for pid_file in folder.glob("*.pid"):
            subprocess.run(["kill", pid_file.read_text().strip()], check=False)
