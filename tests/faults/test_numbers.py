"""Numbers that are none, in a gradient, a weight, a master weight, a batch; a bit that flips in one rank's weights."""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hyperp.training.logging import read_metrics
from tests.faults.conftest import ITERATIONS, LAYOUTS, Undisturbed
from tests.faults.job import Job, assert_told
from tests.faults.ledger import Fault
from tests.faults.planting import Flipped, Planted
from tests.faults.seeds import first, seeds

Runs = Callable[[str], Undisturbed]
Record = Callable[[Fault], None]


@pytest.mark.parametrize("seed", seeds(0, 6))
@pytest.mark.parametrize("where", first("gradient", "batch"))
def test_one_bad_step(where: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """All ranks leave the step out, say so, and train on with the next batch."""
    picked, run = random.Random(f"{where} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(tmp_path / "job", run.config, run.flags)
    value, rank = picked.choice([math.nan, math.inf, -math.inf]), picked.randrange(2)
    ending = job.run({rank: Planted(where, value, picked.randrange(2, 20))})
    assert ending.codes == [0, 0], ending.errors
    rows = read_metrics(job.folder)
    assert rows[-1]["skipped"] == 1
    assert math.isfinite(rows[-1]["loss"])
    assert job.lost_checkpoints() == 0
    record(Fault(f"NaN or Inf in a {where}", "passed over"))


@pytest.mark.parametrize("seed", seeds(1, 8))
@pytest.mark.parametrize("where", first("weight", "master"))
def test_bad_weights_are_never_saved(where: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """The run stops, and goes on from what was saved before."""
    picked, run = random.Random(f"{where} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    job = Job(shutil.copytree(run.half, tmp_path / "job"), run.config, run.flags)
    value, rank = picked.choice([math.nan, math.inf]), picked.randrange(2)
    ending = job.run({rank: Planted(where, value, picked.randrange(1, 8))})
    assert_told(ending)
    assert 0 not in ending.codes
    assert "finite" in ending.lines()[0]
    lost = job.lost_checkpoints()
    assert lost == 0
    steps = job.resumes(run.straight)
    record(Fault(f"NaN or Inf in a {where}", "bit for bit", steps, lost))


@pytest.mark.parametrize("seed", seeds(0, 6))
@pytest.mark.parametrize("moment", ["in a pass", "before a save"])
def test_a_bit_flips_on_one_rank(moment: str, seed: int, undisturbed: Runs, tmp_path: Path, record: Record) -> None:
    """Replicas are compared: nothing of it is saved, and the run that goes on compares them as well."""
    picked, run = random.Random(f"{moment} {seed}"), undisturbed(list(LAYOUTS)[seed % len(LAYOUTS)])
    check = ("--check-weight-hash-across-dp-replicas-interval", 1 if moment == "in a pass" else ITERATIONS)
    job = Job(shutil.copytree(run.half, tmp_path / "job"), run.config, (*run.flags, *check))
    proof = tmp_path / "proof"
    save, step = picked.randrange(1, 3) if moment == "before a save" else 0, picked.randrange(1, 12)
    ending = job.run({picked.randrange(2): Flipped(save, step, proof)})
    assert proof.exists(), "the fault did not strike"
    assert_told(ending)
    assert ending.codes == [2, 2]
    assert re.search("(of|master of) .* found (in iteration|before the save)", ending.lines()[0])
    lost = job.lost_checkpoints()
    assert lost == 0
    steps = job.resumes(run.straight)
    record(Fault(f"a bit of one rank's weights flips {moment}", "bit for bit", steps, lost))
