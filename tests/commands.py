"""Command lines, run in the process of the test."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest

from megatron_hyperp.errors import run_command


def run_here(
    main: Callable[[list[str]], int | None], *words: Any, capsys: pytest.CaptureFixture[str]
) -> CompletedProcess[str]:
    """Run a tool's ``main`` as its command line does, and return the exit code and what was printed meanwhile."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main, list(map(str, words)))
    code = ended.value.code
    assert isinstance(code, int)
    output, errors = capsys.readouterr()
    return CompletedProcess(words, code, output, errors)
