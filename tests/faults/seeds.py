"""How often a fault is tried, and with how many data-loading processes."""

from __future__ import annotations

import os
import zlib
from typing import Any

import pytest


def first(*given: Any) -> list[Any]:
    """Return parameters of which CI takes the first alone."""
    return [pytest.param(value, marks=[pytest.mark.slow] if index else []) for index, value in enumerate(given)]


def seeds(short: int, long: int) -> list[Any]:
    """Return so many seeds; those after the first few are slow.

    Args:
        short: of the tests that CI runs.
        long: of ``make test-faults``.
    """
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= short else []) for seed in range(long)]


def worker_counts(test: str) -> list[int]:
    """Return the numbers of data-loading processes per rank with which a test is run.

    ``FAULT_WORKERS`` names them; `make test-faults` gives "0 1 2". Without it each test has one of these, by its name.

    Args:
        test: name of its function.
    """
    if given := os.environ.get("FAULT_WORKERS"):
        return [int(word) for word in given.split()]
    return [zlib.crc32(test.encode()) % 3]
