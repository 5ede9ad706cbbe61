"""The count of faults: what was tried, how it ended, what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

KEY = "fault"


@dataclass(frozen=True)
class Fault:
    """One fault, and what came of it.

    Attributes:
        kind: what was done.
        outcome: "bit for bit": the run, started again if it had ended, wrote the undisturbed run's metrics to the bit.
            "refused": it did not start, or stopped on all ranks, with one line that says why, and what was saved is
            untouched. "passed over": it trained on without the step that was hit.
        steps: iterations that had to be done again.
        bytes_lost: of completed checkpoints that the run should have kept.
        count: faults in one, all of that kind and outcome.
    """

    kind: str
    outcome: str
    steps: int = 0
    bytes_lost: int = 0
    count: int = 1


def table(rows: Iterable[dict[str, Any]], hangs: int, wrong: int) -> str:
    """Return the table of faults by kind.

    Args:
        rows: faults, as ``asdict`` makes them.
        hangs: tests that failed as a rank hung.
        wrong: tests that failed for another reason.
    """
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(Fault(**row))
    head = ("fault", "tried", "bit for bit", "refused", "passed over", "steps lost", "bytes lost")
    lines = [head, *(_row(kind, faults) for kind, faults in sorted(kinds.items()))]
    lines.append(_row("all", [fault for faults in kinds.values() for fault in faults]))
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(head))]
    text = [
        "  ".join(str(word).ljust(width) if not index else str(word).rjust(width) for index, (word, width) in
                  enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join([*text, f"ranks that hung: in {hangs} tests; other failed tests: {wrong}"])


def _row(kind: str, faults: list[Fault]) -> tuple[Any, ...]:
    def tried(outcome: str) -> int:
        return sum(fault.count for fault in faults if fault.outcome == outcome)

    steps, lost = (sum(getattr(fault, name) for fault in faults) for name in ("steps", "bytes_lost"))
    total = sum(fault.count for fault in faults)
    return kind, total, tried("bit for bit"), tried("refused"), tried("passed over"), steps, lost


def entry(fault: Fault) -> tuple[str, dict[str, Any]]:
    """Return the property of a test report that holds a fault."""
    return KEY, asdict(fault)
