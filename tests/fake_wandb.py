"""A stand-in for wandb: which runs are started, continued and written to, by the arguments and the environment."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest


class FakeRun:
    """A run: its ID, every start's arguments, and the steps that were logged."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.starts: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def log(self, row: dict[str, float], step: int) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        pass


def install(patch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    """Replace wandb, and clear its environment; return the runs by ID, which fill as trainings start them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    runs: dict[str, FakeRun] = {}

    def init(**arguments: Any) -> FakeRun:
        # An argument comes before the environment, except for None.
        run_id = arguments.get("id") or os.environ.get("WANDB_RUN_ID") or f"run{len(runs)}"
        run = runs.setdefault(run_id, FakeRun(run_id))
        run.starts.append(arguments)
        return run

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "wandb", module)
    return runs
