"""Which run a checkpoint belongs to: that run continues its own reports; any other run is a branch, with a parent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import read_json, write_atomically
from megatron_hyperp.training.checkpointing import PARENT, RUN_ID, config_text
from megatron_hyperp.training.logging import CONFIG_FILE

# In the run folder of a branch: its parent and its Weights & Biases run, until checkpoints of its own hold both.
BRANCH_FILE = "branch.json"


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a run comes from.

    Attributes:
        continued: the run wrote the checkpoint that it starts from, so its metrics continue in the same files.
        run_id: Weights & Biases run to continue, if there is one.
        parent: of a branch: the checkpoint that it started from, that checkpoint's iteration, and the run folder and
            Weights & Biases run id of the run that wrote it; None for a run that started from scratch.
    """

    continued: bool = False
    run_id: str | None = None
    parent: dict[str, Any] | None = None

    def describe(self, checkpoint: Path) -> str:
        """Name the checkpoint that the run starts from, and whose it is if it is another run's."""
        if self.parent is None or self.parent["checkpoint"] != str(checkpoint.resolve()):
            return str(checkpoint)
        return f"{checkpoint} (of the run in {self.parent['run_dir']})"


def trace(config: Config, checkpoint: Path, common: dict[str, Any], *, weights_only: bool) -> Lineage:
    """Find out where a run comes from that starts from a checkpoint.

    Args:
        config: resolved.
        checkpoint: folder of one iteration.
        common: values that all ranks share in it.
        weights_only: the run takes the weights alone and starts at iteration 0.
    """
    there = arguments.load_stored(checkpoint / CONFIG_FILE)
    if not weights_only and is_same_run(there, config):
        return Lineage(_owns_metrics(config), common.get(RUN_ID), common.get(PARENT))
    parent = {
        "checkpoint": str(checkpoint.resolve()),
        "iteration": (common.get("progress") or {}).get("iteration", 0),
        "run_dir": there.logging.run_dir,
        "wandb_run_id": common.get(RUN_ID),
    }
    return Lineage(run_id=_id_of_first_attempt(config, parent), parent=parent)


def is_same_run(there: Config, here: Config) -> bool:
    """Whether two configs are of one run: it has one run folder, and one folder for checkpoints if it saves any."""
    saves = there.checkpoint.save, here.checkpoint.save
    return _same(there.logging.run_dir, here.logging.run_dir) and (None in saves or _same(*saves))


def check_tensorboard(config: Config, checkpoint: Path, *, weights_only: bool) -> None:
    """Refuse to write a branch's TensorBoard events between those of its parent.

    Raises:
        UsageError: both have the same folder.
    """
    there, folder = arguments.load_stored(checkpoint / CONFIG_FILE), config.logging.tensorboard_dir
    branch = weights_only or not is_same_run(there, config)
    if branch and folder is not None and _same(there.logging.tensorboard_dir, folder):
        raise UsageError(
            f"--tensorboard-dir {folder} holds the events of the run that wrote {checkpoint} (run folder"
            f" {there.logging.run_dir}), and this is another run; give it another --tensorboard-dir, or continue that"
            " run with its --run-dir and --save",
            same_on_all_ranks=True,
        )


def record_branch(config: Config, lineage: Lineage, run_id: str | None) -> None:
    """Keep a branch's Weights & Biases run, for the case that the job is restarted before its first checkpoint."""
    if lineage.parent is not None and not lineage.continued and run_id is not None:
        content = json.dumps({"run_id": run_id, "parent": lineage.parent})
        write_atomically(Path(config.logging.run_dir) / BRANCH_FILE, content)


def _id_of_first_attempt(config: Config, parent: dict[str, Any]) -> str | None:
    """Return the Weights & Biases run of an earlier start of this job, with the same settings from the same parent."""
    folder = Path(config.logging.run_dir)
    try:
        found = read_json(folder / BRANCH_FILE)
        same = found["parent"] == parent and (folder / CONFIG_FILE).read_text() == config_text(config)
        return str(found["run_id"]) if same else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _owns_metrics(config: Config) -> bool:
    """Whether the last run in the run folder was this one: a branch may have used its parent's folder meanwhile."""
    try:
        return is_same_run(arguments.load_stored(Path(config.logging.run_dir) / CONFIG_FILE), config)
    except UsageError:  # lost or damaged: it is written again
        return True


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
