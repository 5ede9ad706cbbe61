"""Prints what a long run has tried."""

from __future__ import annotations

from typing import Any

from tests.fuzz import profiles


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if profiles.LONG:
        terminalreporter.section("fuzzing")
        for line in profiles.table():
            terminalreporter.write_line(line)
