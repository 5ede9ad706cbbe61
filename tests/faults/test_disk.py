"""Disks that are full, read-only, gone, or fail."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import LAYOUTS, Undisturbed
from tests.faults.job import Job, assert_told
from tests.faults.ledger import Fault
from tests.faults.planting import FailingCall
from tests.faults.seeds import seeds

Runs = Callable[[str], Undisturbed]
Record = Callable[[Fault], None]
mounts = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a tmpfs needs root")


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], check=False, capture_output=True).returncode == 0


def unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own for a job, of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)):
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    unmount(place)


@mounts
@pytest.mark.parametrize("seed", seeds(1, 12))
def test_a_full_disk(seed: int, undisturbed: Runs, disk: Path, tmp_path: Path, record: Record) -> None:
    """So few bytes are left that the next save, or a row of metrics, finds no room."""
    picked, run = random.Random(seed), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(shutil.copytree(run.half, disk / "job"), run.config, run.flags, logs=tmp_path)
    newest = job.newest()
    free = picked.randrange(sum(path.stat().st_size for path in newest.iterdir()) * 9 // 10)
    filler = disk / "filler"
    room = shutil.disk_usage(disk).free - free
    with filler.open("wb") as stream:
        stream.write(bytes(room))
    ending = job.run()
    assert any(ending.codes), "the fault did not strike"
    assert_told(ending)
    lost = job.lost_checkpoints()
    assert lost == 0
    filler.unlink()
    record(Fault("disk full", "bit for bit", job.resumes(run.straight), lost))


@mounts
@pytest.mark.parametrize("seed", seeds(0, 6))
def test_a_disk_that_becomes_read_only(seed: int, undisturbed: Runs, disk: Path, record: Record) -> None:
    picked, run = random.Random(seed), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(disk / "job", run.config, run.flags)
    started = job.start()
    job.wait_for_rows(started, picked.randrange(1, 20))
    # Files that are open for writing keep a disk from becoming read-only: what is above it may.
    if not mount("--bind", str(job.folder / "checkpoints"), str(job.folder / "checkpoints")):
        pytest.skip("a folder cannot be mounted here")
    mount("-o", "remount,ro,bind", str(job.folder / "checkpoints"))
    ending = started.wait()
    unmount(job.folder / "checkpoints")
    assert any(ending.codes), "the fault did not strike"
    assert_told(ending)
    lost = job.lost_checkpoints()
    assert lost == 0
    record(Fault("save folder becomes read-only", "bit for bit", job.resumes(run.straight), lost))


@pytest.mark.parametrize("seed", seeds(0, 6))
def test_a_save_folder_that_vanishes(seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """A mount that is lost; it comes back before the job is started again."""
    picked, run = random.Random(seed), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(tmp_path / "job", run.config, run.flags)
    started = job.start()
    job.wait_for_rows(started, picked.randrange(1, 20))
    there, away = job.folder / "checkpoints", tmp_path / "away"
    there.rename(away)
    there.write_text("no folder")
    ending = started.wait()
    there.unlink()
    away.rename(there)
    assert any(ending.codes), "the fault did not strike"
    assert_told(ending)
    lost = job.lost_checkpoints()
    assert lost == 0
    record(Fault("save folder vanishes", "bit for bit", job.resumes(run.straight), lost))


@pytest.mark.parametrize("seed", seeds(0, 8))
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_call_that_fails(call: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """The n-th call, from the start of the run into its saves."""
    picked, run = random.Random(f"{call} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(shutil.copytree(run.half, tmp_path / "job"), run.config, run.flags)
    code = picked.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
    proof = tmp_path / "proof"
    # Rank 0 alone writes the config, the tracker and the checksums.
    ending = job.run({0: FailingCall(call, picked.randrange(1, 9), proof, code)})
    assert proof.exists(), "the fault did not strike"
    assert_told(ending)
    lost = job.lost_checkpoints()
    assert lost == 0
    record(Fault(f"{call} fails", "bit for bit", job.resumes(run.straight), lost))
