"""What unit tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def commands_leave_by_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``run_command`` raise SystemExit; with child processes, which earlier tests may have left, it would exit."""
    monkeypatch.setattr("megatron_hyperp.errors.has_children", lambda: False)
