"""Files that are not what was written: checkpoints, the tracker, what a run writes, corpora and their indices."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hyperp.data.content import record as take_checksums
from megatron_hyperp.training.checkpoint_folders import TRACKER
from megatron_hyperp.training.logging import EVENTS_FILE, METRICS_FILE
from tests.faults.conftest import HALF, LAYOUTS, Undisturbed
from tests.faults.job import Job, assert_told
from tests.faults.ledger import Fault
from tests.faults.seeds import first, seeds
from tests.functional.launch import assert_same_run
from tests.toy import write_corpus

Runs = Callable[[str], Undisturbed]
Record = Callable[[Fault], None]
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, picked: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[picked.randrange(len(content))] ^= 1 << picked.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, picked: random.Random) -> None:
    os.truncate(path, picked.randrange(path.stat().st_size))


def delete(path: Path, picked: random.Random) -> None:
    path.unlink()


def swap(path: Path, picked: random.Random) -> None:
    """Bytes of another file of the same length."""
    path.write_bytes(picked.randbytes(path.stat().st_size))


DAMAGES = (delete, flip, truncate, swap)


def half_way(run: Undisturbed, tmp_path: Path) -> Job:
    return Job(shutil.copytree(run.half, tmp_path / "job"), run.config, run.flags)


@pytest.mark.parametrize("seed", seeds(1, 8))
@pytest.mark.parametrize("damage", first(*DAMAGES))
def test_a_file_of_the_newest_checkpoint(
    damage: Damage, seed: int, undisturbed: Runs, tmp_path: Path, record: Record
) -> None:
    """The checkpoint before it is taken, and the run ends the same."""
    picked, run = random.Random(f"{damage.__name__} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = half_way(run, tmp_path)
    files = sorted(job.newest().iterdir())
    damage(picked.choice(files), picked)
    steps = job.resumes(run.straight)
    assert job.lost_checkpoints() == 0
    record(Fault(f"checkpoint file: {damage.__name__}", "bit for bit", steps))


@pytest.mark.parametrize("seed", seeds(0, 4))
def test_half_a_checkpoint(seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    picked, run = random.Random(seed), undisturbed("dp2")
    job = half_way(run, tmp_path)
    files = sorted(job.newest().iterdir())
    for path in picked.sample(files, len(files) // 2):
        path.unlink()
    steps = job.resumes(run.straight)
    record(Fault("checkpoint half deleted", "bit for bit", steps))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"99\n", b"", b"\xff\xfe", b"-1", b"iter_0000012"])
def test_a_tracker_that_names_nothing(content: bytes, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    tracker = job.folder / "checkpoints" / TRACKER
    tracker.write_bytes(content)
    ending = job.run()
    assert_told(ending)
    assert ending.codes == [2, 2]
    assert "complete ones there: iter_0000008, iter_0000012; name one" in ending.lines()[0]
    assert job.lost_checkpoints() == 0
    tracker.write_text(f"{HALF}\n")
    job.resumes(run.straight)
    record(Fault("tracker names nothing", "refused"))


def test_a_lost_tracker(undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    (job.folder / "checkpoints" / TRACKER).unlink()
    steps = job.resumes(run.straight)
    assert steps == 0
    record(Fault("tracker lost", "bit for bit", steps))


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [EVENTS_FILE, "config.yaml"])
def test_a_file_of_the_run(name: str, damage: Damage, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """They are for people, and no training depends on them."""
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    damage(job.folder / name, random.Random(name))
    ending = job.run()
    assert ending.codes == [0, 0], ending.errors
    assert_same_run(job.folder, run.straight)
    record(Fault(f"{name} of the run: damaged", "bit for bit"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, delete, swap])
def test_metrics_that_are_damaged(damage: Damage, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """What they lost is lost; what is written from then on is as it would have been."""
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    damage(job.folder / METRICS_FILE, random.Random(1))
    ending = job.run()
    assert ending.codes == [0, 0], ending.errors
    expected = (run.straight / METRICS_FILE).read_text().splitlines()[HALF:]
    written = (job.folder / METRICS_FILE).read_bytes().splitlines()[-len(expected) :]

    for ours, theirs in zip(written, expected, strict=True):
        assert json.loads(ours)["loss"] == json.loads(theirs)["loss"]
    record(Fault(f"{METRICS_FILE}: damaged", "bit for bit"))


@pytest.mark.parametrize("seed", seeds(0, 2))
@pytest.mark.parametrize("damage", first(flip, truncate, delete, swap))
@pytest.mark.parametrize("suffix", first(".bin", ".idx"))
def test_a_corpus(suffix: str, damage: Damage, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """With checksums, as tools/preprocess_data.py writes them: refused by all ranks before anything is touched."""
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    prefix = _copy_of_corpus(run, tmp_path)
    take_checksums(prefix)
    path = Path(f"{prefix}{suffix}")
    sound = path.read_bytes()
    damage(path, random.Random(seed))
    job.flags = (*run.flags, "--data-path", prefix)
    ending = job.run()
    assert_told(ending)
    assert ending.codes == [2, 2], ending.errors
    assert str(path) in ending.lines()[0] or str(Path(prefix)) in ending.lines()[0]
    assert job.lost_checkpoints() == 0
    path.write_bytes(sound)
    job.resumes(run.straight)
    record(Fault(f"corpus {suffix}: {damage.__name__}", "refused"))


@pytest.mark.slow
def test_the_index_of_another_corpus(undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    run = undisturbed("dp2")
    job = half_way(run, tmp_path)
    prefix = _copy_of_corpus(run, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    sound = Path(f"{prefix}.idx").read_bytes()
    shutil.copy(write_corpus(other, documents=500, seed=1) + ".idx", f"{prefix}.idx")
    job.flags = (*run.flags, "--data-path", prefix)
    ending = job.run()
    assert_told(ending)
    assert ending.codes == [2, 2], ending.errors
    assert "of another corpus" in ending.lines()[0]
    Path(f"{prefix}.idx").write_bytes(sound)
    job.resumes(run.straight)
    record(Fault("corpus .idx: of another", "refused"))


@pytest.mark.parametrize("seed", seeds(0, 3))
@pytest.mark.parametrize("damage", first(flip, truncate, delete))
def test_a_cached_order_of_samples(
    damage: Damage, seed: int, undisturbed: Runs, tmp_path: Path, record: Record
) -> None:
    """Megatron would read a flipped bit as another order."""
    run, picked = undisturbed("dp2"), random.Random(seed)
    job = half_way(run, tmp_path)
    cache = tmp_path / "cache"
    job.flags = (*run.flags, "--data-cache-path", cache)
    first = Job(tmp_path / "first", run.config, (*job.flags, "--exit-interval", 1)).run()
    assert first.codes == [0, 0], first.errors
    damage(picked.choice(sorted(cache.rglob("*.npy"))), picked)
    steps = job.resumes(run.straight)
    record(Fault(f"cached order of samples: {damage.__name__}", "bit for bit", steps))


def _copy_of_corpus(run: Undisturbed, tmp_path: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(run.config.parent / f"toy{suffix}", tmp_path / f"corpus{suffix}")
    return str(tmp_path / "corpus")
