"""How far a tool is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows on standard error how much of the whole is done; a context manager.

    Args:
        total: of what is counted; None if that is not known.
        describe: says it in words, given what is done and the seconds that took.
    """

    def __init__(self, total: int | None, describe: Callable[[int, float], str]) -> None:
        self._describe = describe
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that so much is done."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._describe(done, seconds))
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self._describe(done, seconds), file=sys.stderr, flush=True)
