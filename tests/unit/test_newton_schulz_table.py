"""The table of docs/newton-schulz.md has the sets, columns and restarts of the code; last digits are the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.newton_schulz import run

PAGE = Path(__file__).parents[2] / "docs/newton-schulz.md"
EXACT = 4  # set, steps, singular values, restarts: the same on every machine
ROUNDING = 5


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_is_current() -> None:
    written, found = cells(PAGE.read_text()), cells(run.table())
    assert [row[:EXACT] for row in written] == [row[:EXACT] for row in found]
    assert written[0] == found[0]
    for before, now in zip(written[2:], found[2:], strict=True):
        assert len(before) == len(now) == EXACT + ROUNDING
        # Another processor sums in another order.
        for old, new in zip(before[EXACT:], now[EXACT:], strict=True):
            assert float(new) == pytest.approx(float(old), rel=1.0), before[0]
