"""A rank that ends while it takes a batch: its loading process prints no traceback."""

from __future__ import annotations

import sys

import pytest

from megatron_hyperp.data.batches import _ignore_lost_connections


def test_broken_connections_print_nothing_and_other_errors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: printed.append(kind))
    _ignore_lost_connections()
    for error in (ConnectionResetError(), BrokenPipeError(), EOFError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert printed == [ValueError]
