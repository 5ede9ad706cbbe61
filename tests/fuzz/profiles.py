"""How much is tried, and what counts as a finding.

Quick runs (CI) draw the same few examples each time. ``FUZZ_EXAMPLES=20000`` (``make test-fuzz``) draws as many new
ones for each target; what fails is shrunk, printed with the lines to repeat it, and kept in ``.hypothesis`` until it
passes.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis

LONG = int(os.environ.get("FUZZ_EXAMPLES", "0"))
# Seconds and bytes that reading one small damaged input may take: far above what a reader needs, far below a hang.
SECONDS, BYTES = 10.0, 2**28


@dataclass
class Tally:
    """What a target has been through: executions, the places in code that failed, seconds."""

    executions: int = 0
    findings: set[str] = field(default_factory=set)
    seconds: float = 0.0


TALLIES: dict[str, Tally] = {}


def fuzzed(quick: int, *, slowness: int = 1) -> Callable[[Any], Any]:
    """Settings of a test: so many examples in a quick run; ``slowness`` divides those of a long one."""
    return hypothesis.settings(
        max_examples=max(1, LONG // slowness) if LONG else quick,
        derandomize=not LONG,
        database=hypothesis.database.DirectoryBasedExampleDatabase(".hypothesis/examples") if LONG else None,
        deadline=timedelta(seconds=SECONDS),
        print_blob=bool(LONG),
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[phase for phase in hypothesis.Phase if LONG or phase is not hypothesis.Phase.explain],
    )


def run(target: str, reader: Callable[..., Any], *given: Any, refusals: tuple[type[BaseException], ...]) -> Any:
    """Read one input: it is read, or refused by an error that the reader documents, in time and within bounds.

    Returns:
        What the reader returned; None if it refused.
    """
    tally = TALLIES.setdefault(target, Tally())
    tally.executions += 1
    before, started = address_space(), time.monotonic()
    try:
        return reader(*given)
    except refusals as error:
        message = str(error)
        assert message.isprintable(), f"not one line of text: {message}"
        assert len(message) < 6000
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            tally.findings.add(place(error))
        raise
    finally:
        seconds, grown = time.monotonic() - started, address_space() - before
        tally.seconds += seconds
        if grown > BYTES:
            tally.findings.add("memory")
        assert grown <= BYTES, f"took {grown:,} bytes"
    return None


def place(error: BaseException) -> str:
    """An error's type, and where it was raised: what tells two findings apart."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {Path(last.filename).name}:{last.lineno}"


def address_space() -> int:
    """Most bytes that this process has ever had mapped: also what was taken and given back at once."""
    found = re.search(r"VmPeak:\s+([0-9]+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def table() -> list[str]:
    """Lines of the report of a long run."""
    lines = [f"{'target':28} {'executions':>10} {'findings':>8} {'seconds':>8}"]
    for name, tally in sorted(TALLIES.items()):
        lines.append(f"{name:28} {tally.executions:>10,} {len(tally.findings):>8} {tally.seconds:>8.1f}")
        lines += [f"    {finding}" for finding in sorted(tally.findings)]
    return lines
