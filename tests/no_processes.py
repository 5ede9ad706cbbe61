"""Fixtures of tests that run in the process of pytest and start no other (``tests/unit``, ``tests/integration``)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

# The calls that start a process in Python; multiprocessing's contexts all start theirs by ``BaseProcess.start``.
STARTERS: tuple[tuple[Any, str], ...] = (
    (subprocess.Popen, "__init__"),
    (BaseProcess, "start"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
)


def refuse_to_start(*_: Any, **__: Any) -> None:
    raise AssertionError("this test may start no process: move it to tests/functional, or to tests/distributed")


@pytest.fixture(scope="package", autouse=True)
def no_processes() -> Iterator[None]:
    """Of the whole folder, so that it holds for fixtures of modules as well."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTERS:
            patch.setattr(owner, name, refuse_to_start)
        yield


@pytest.fixture(autouse=True)
def commands_leave_by_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``run_command`` raise SystemExit; with child processes, which earlier tests may have left, it would exit."""
    monkeypatch.setattr("megatron_hyperp.errors.has_children", lambda: False)
