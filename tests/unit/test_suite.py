"""The suite's own rules."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        lambda: multiprocessing.get_context("fork").Process(target=int).start(),
        lambda: multiprocessing.get_context("spawn").Process(target=int).start(),
        lambda: os.fork(),
        lambda: os.system("true"),
    ],
    ids=["subprocess", "fork", "spawn", "os.fork", "os.system"],
)
def test_a_unit_test_that_starts_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="this test may start no process"):
        start()


@pytest.fixture(scope="module")
def started() -> str:
    try:
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    except AssertionError as error:
        return str(error)
    return "it started"


def test_a_fixture_of_a_module_starts_none_either(started: str) -> None:
    assert started.startswith("this test may start no process")
