"""The axes of a sweep: the names that may vary, lists and ranges of values, and searches that find their own."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.errors import UsageError

# Learning rates held fixed, and the factors by which that is done, each with a role that it is of.
HELD = {"embedding_lr": "embedding_lr_mult", "adam_lr": "adam_lr_mult"}
HELD_ROLES = {"embedding_lr_mult": "embedding", "adam_lr_mult": "vector"}
FIELDS: dict[str, tuple[str, Any]] = {
    name: (section, hint)
    for section, kind in arguments.section_types().items()
    for name, hint in typing.get_type_hints(kind).items()
}


@dataclass(frozen=True, slots=True)
class Search:
    """An axis that finds its own values: start x factor^power, widened until the minimum lies inside.

    Attributes:
        name: of the field, a learning rate.
        start: value of power 0; the powers -1, 0 and 1 come first.
        factor: ratio of neighbours.
        bracket: worse values wanted on either side of the best one.
        limit: most values.
    """

    name: str
    start: float
    factor: float = math.sqrt(2)
    bracket: int = 1
    limit: int = 12

    def value(self, power: int) -> float:
        """The value of a power, of six digits, so that tables show it whole."""
        return float(f"{self.start * self.factor**power:.6g}")

    def powers(self, losses: Mapping[int, float]) -> list[int]:
        """Powers to measure, those in ``losses`` among them: a function of the losses alone, whatever their order.

        Args:
            losses: held-out loss by power, infinite where training diverged.
        """
        wanted = [-1, 0, 1]
        while len(wanted) < self.limit and all(power in losses for power in wanted):
            best = min(sorted(wanted), key=lambda power: losses[power])
            around = range(best - self.bracket, best + self.bracket + 1)
            further = [power for power in around if power not in wanted]
            if not further:
                break
            wanted += further[: self.limit - len(wanted)]
        return wanted


def parse_axis(name: str, axis: Any, where: str) -> list[Any] | Search:
    """Read a list of values, a range ``from/to/factor``, or a search.

    Raises:
        UsageError: anything else.
    """
    if isinstance(axis, dict):
        return _parse_search(name, axis, where)
    if isinstance(axis, list) and axis:
        return axis
    words = axis.split("/") if isinstance(axis, str) else []
    if len(words) == 3 and all(map(is_number, words)):
        first, last, factor = map(float, words)
        if 0 < first <= last and factor > 1:
            count = math.floor(math.log(last / first) / math.log(factor) + 1e-6) + 1
            values = [float(f"{first * factor**power:.12g}") for power in range(count)]
            return [int(value) if value.is_integer() else value for value in values]
    raise UsageError(
        f"{where} is {axis!r}; give a list of values, a range FROM/TO/FACTOR of numbers above 0 with a factor above 1,"
        " or a search such as {start: 0.03, factor: 1.4142, bracket: 1}"
    )


def _parse_search(name: str, axis: dict[str, Any], where: str) -> Search:
    hints = {"start": float, "factor": float, "bracket": int, "limit": int}
    for key in axis:
        if key not in hints:
            raise UsageError(f"{where}: key {key} of a search is unknown; {meant(str(key), list(hints))}")
    if "start" not in axis:
        raise UsageError(f"{where}: a search lacks its start; give {{start: 0.03}}, say")
    hint = FIELDS[name][1] if name in FIELDS else float
    if hint not in (float, float | None):
        raise UsageError(f"{where}: a search is for learning rates and their like; give {name} a list")
    search = Search(name, **{key: arguments.convert(axis[key], hints[key], f"{where}: {key}") for key in axis})
    if not (0 < search.start < math.inf and 1 < search.factor < math.inf and search.bracket >= 1 and search.limit >= 3):
        raise UsageError(f"{where}: a search needs start > 0, factor > 1, bracket >= 1 and limit >= 3, not {axis}")
    return search


def meant(name: str, known: Sequence[str]) -> str:
    """Say which known name a wrong one is near, or which there are."""
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"did you mean {near[0]}?"
        if near
        else f"known are {', '.join(known[:12])}"
        + (", ... (examples/pretrain_gpt.py --help lists them)" if len(known) > 12 else "")
    )


def is_number(word: str) -> bool:
    """Whether a word is a finite number."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
