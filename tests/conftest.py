"""What all tests share: a toy corpus, and results that are computed once per session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import Cases

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all processes of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


@pytest.fixture(scope="session")
def corpus(shared: Path) -> str:
    """Prefix of the toy corpus."""
    from tests.toy import write_corpus

    return str(Cases(shared / "corpus", lambda _, folder: write_corpus(folder))["toy"])


@pytest.fixture(scope="module")
def cases(shared: Path, request: pytest.FixtureRequest) -> Callable[..., Cases]:
    """Return a function that makes :class:`Cases` of this test module by what computes them, with a title for each."""

    def make(compute: Callable[[Any, Path], Any], title: str = "cases") -> Cases:
        return Cases(shared / request.module.__name__ / title, compute)

    return make
