"""Where the time of a run goes, as rank 0's host sees it.

Under CUDA, what the device still works off counts for the phase in which the host waits for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What a run's summary tells apart. Communication is that of gradients and weights over data-parallel ranks; that of
# layers is a part of forward and backward passes.
NAMES = ("forward-backward", "optimizer", "communication", "data", "evaluation", "checkpoint", "reports")


class Phases:
    """Adds up the seconds of phases; a phase inside another one is taken out of that."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._open: list[str] = []
        self._mark = time.monotonic()
        self.started = self._mark

    @property
    def current(self) -> str:
        """Where the run is now."""
        return next(iter(self._open[-1:]), "other")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time until the block ends for a phase."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed as a phase."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def describe(self) -> str:
        """Return one line with each phase's share."""
        total = time.monotonic() - self.started
        shares = {**self.seconds, "other": total - sum(self.seconds.values())}
        parts = [
            f"{name} {value:.1f} s ({value / max(total, 1e-9):.0%})" for name, value in shares.items() if value >= 0.05
        ]
        return f"{total:.1f} s: " + ", ".join(parts)
