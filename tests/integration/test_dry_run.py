"""Dry runs: recipes on up to 1,024 ranks, and what is refused; they move nothing and need no other rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import pretrain_gpt
from megatron_hyperp import arguments, device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.planning.layouts import Cluster, layouts
from megatron_hyperp.planning.plan import with_vocabulary
from megatron_hyperp.training.dry_run import build_rank, dry_run
from tests.toy import MOE, SMALL

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WORLDS = (8, 64, 256, 1024)
# The smallest and the largest of the paper's models; the planner takes seconds for each model on many GPUs.
ENDS = ("dense_d8", "dense_d24", "moe_d8", "moe_d24")

EIGHT = f"{SMALL} {MOE} --pipeline-model-parallel-size 2 --expert-model-parallel-size 2"


def recipes() -> Iterator[Any]:
    """Recipes with a number of GPUs, marked by the time that they take; the quickstarts' batches are for few."""
    for name in NAMES:
        for gpus in WORLDS:
            if gpus > 8 and "quickstart" in name:
                continue
            quick = gpus == 8 and (not name.startswith("moe") or name == "moe_d8")
            if quick or (gpus == 1024 and name == "moe_d8"):
                yield name, gpus
            else:
                matrix = gpus <= 64 or name in ENDS
                yield pytest.param(name, gpus, marks=pytest.mark.matrix if matrix else pytest.mark.slow)


@pytest.mark.parametrize(("name", "gpus"), list(recipes()))
def test_recipes_on_up_to_1024_ranks(name: str, gpus: int) -> None:
    """Dry runs at the layouts that the planner would take."""
    cluster, printed = Cluster(GPUS["H100"], gpus), list[str]()
    with device.planning_for("cuda"):
        [layout, *_], _ = layouts(with_vocabulary(arguments.load_yaml(FOLDER / f"{name}.yaml")), cluster)
    dry_run(layout.config, cluster, rank=None, log=printed.append)
    title, text = layout.describe(), "\n".join(printed)
    assert f"layout         {title}: divides" in text
    assert f"rank 0 of {gpus}, on node 0: tensor 0 of " in text
    # Both ends of a pipeline.
    last = f"rank {gpus - 1} of {gpus}, on node {(gpus - 1) // 8}: "
    assert (last in text) == ("PP" in title)
    assert text.count("decoder.final_layernorm.weight") == 1
    for words in ("fits into 71.1 GiB", "sent by a GPU in a step", "max/mean", " hours on ", "padding"):
        assert words in text
    assert "DOES NOT FIT" not in text


def build_eight() -> list[Any]:
    config = arguments.parse(EIGHT.split(), description="").resolve(world_size=8)
    return [build_rank(config, 8, rank) for rank in range(8)]


def test_the_ranks_of_a_job_own_the_model_once() -> None:
    ranks = build_eight()
    whole = {name: shape for rank in ranks for name, shape in rank.shapes.items()}
    assert sum(rank.memory.master for rank in ranks) == 4 * sum(math.prod(shape) for shape in whole.values())
    assert [rank.coordinates["pipeline"] for rank in ranks] == [(0, 2)] * 4 + [(1, 2)] * 4
    assert [rank.coordinates["data"] for rank in ranks] == [(index % 4, 4) for index in range(8)]
    assert [rank.coordinates["expert"] for rank in ranks] == [(index % 2, 2) for index in range(8)]
    assert [rank.coordinates["expert data"] for rank in ranks] == [(index % 4 // 2, 2) for index in range(8)]


REFUSED = {
    "--tensor-model-parallel-size 3": "8 rank(s) cannot hold tensor x pipeline parallelism 3 x 1",
    "--pipeline-model-parallel-size 8": "--depth 4 is not divisible by",
    "--num-experts 12 --expert-model-parallel-size 8": "does not divide the 12 routed experts",
    "--global-batch-size 12": "--global-batch-size 12 is not divisible by",
    "--alarm word": "alarm",
    "--vocab-size 7 --tokenizer-model null:64": "more than --vocab-size 7",
    "--micro-batch-size 65536 --global-batch-size 524288": "may use 71.1 GiB of its H100; take a layout",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_divide_is_refused(flags: str) -> None:
    """Dry runs on eight ranks of layouts that do not divide, and with other knobs that cannot be."""
    config = arguments.parse(f"{SMALL} {flags}".split(), description="")
    with pytest.raises(UsageError, match=re.escape(REFUSED[flags])):
        dry_run(config, Cluster(GPUS["H100"], 8), rank=0, log=print)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--world-size 8", "--world-size needs --dry-run"),
        ("--dry-run-rank 0", "--dry-run-rank needs --dry-run"),
        ("--mfu 0.5", "--mfu needs --dry-run"),
        ("--dry-run --world-size 0", "--world-size is 0; it must be 1 or more"),
        ("--dry-run --world-size 8 --dry-run-rank 8", "--dry-run-rank is 8; the ranks of --world-size 8 are 0 to 7"),
        ("--dry-run --dry-run-rank -1", "--dry-run-rank is -1; the ranks of --world-size 1 are 0 to 0"),
        ("--dry-run --world-size 8 --mfu 2", "--mfu is 2; it must be above 0 and at most 1"),
        ("--dry-run --gpu H1000", "H1000"),
    ],
)
def test_bad_input_is_one_line(flags: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pretrain_gpt.main([*SMALL.split(), *flags.split()])


def test_a_launcher_does_not_start_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="start it without torchrun"):
        pretrain_gpt.main([*SMALL.split(), "--dry-run"])
