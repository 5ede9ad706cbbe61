"""How often a fault is tried."""

from __future__ import annotations

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
