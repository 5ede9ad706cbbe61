"""Coefficient sets of Newton-Schulz, and how many steps each kind of matrix gets; plain numbers, no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_hyperp.errors import UsageError

Coefficients = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientSet:
    """The polynomials p(s) = a s + b s^3 + c s^5 that one set applies to singular values, one after another.

    Attributes:
        source: where the figures are from.
        triples: one (a, b, c) a step; further steps repeat the last.
        steps: Newton-Schulz steps that the set is made for.
        margin: factor by which the Frobenius norm before the first step stays below 1.
        shrink: s: the output of every step but those with the last triple is divided by it, so that values which
            rounding has lifted above 1 stay where the next polynomial expects them.
    """

    source: str
    triples: tuple[Coefficients, ...]
    steps: int = 5
    margin: float = 1.0
    shrink: float = 1.0

    def schedule(self, steps: int) -> tuple[Coefficients, ...]:
        """Return one (a, b, c) for each of ``steps`` steps."""
        s, last = self.shrink, self.triples[-1]
        shrunk = [(a / s, b / s**3, c / s**5) if (a, b, c) != last else (a, b, c) for a, b, c in self.triples]
        return tuple(shrunk[min(step, len(shrunk) - 1)] for step in range(steps))


# A further set is one more entry: the flag, the table of docs/newton-schulz.md and the tests take it from here.
SETS: dict[str, CoefficientSet] = {
    "quintic": CoefficientSet(
        source="F. Cesista, leloykun.github.io/ponder/muon-opt-coeffs; taken by HyperP (arXiv 2603.28743)",
        triples=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    # Minimax-optimal per step for singular values in [1e-3, 1].
    "polar_express": CoefficientSet(
        source="Polar Express, arXiv 2505.16932, algorithm 1",
        triples=(
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        margin=1.01,
        shrink=1.01,
    ),
    # Remez polynomials on intervals that adapt to the step before. Shrunk like Polar Express: without that, a matrix of
    # rank one in bf16, whose norm is rounded above 1, grows to 1e11.
    "cans": CoefficientSet(
        source="CANS, arXiv 2506.10935, as rounded in emerging-optimizers 0.3.0",
        triples=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        margin=1.01,
        shrink=1.01,
    ),
    # Its first polynomial is negative above 0.884, so that a matrix of nearly rank one would change its sign: the norm
    # stays below 0.87. Its authors rescale columns first instead (AOL), which depends on more than singular values.
    "aol": CoefficientSet(
        source="Turbo-Muon, arXiv 2512.04632 (github.com/thib-s/flash-newton-schulz), without its column scaling",
        triples=(
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        steps=4,
        margin=1.15,
    ),
    "deepseekv4": CoefficientSet(
        source="DeepSeek-V4 report: eight steps of Muon's first polynomial, then two that settle at 1",
        triples=(*((3.4445, -4.7750, 2.0315),) * 8, *((2.0, -1.5, 0.5),) * 2),
        steps=10,
    ),
    # Cubic: two products a step in place of three. Made for singular values in [7e-3, 1].
    "cubic5": CoefficientSet(
        source="arXiv 2606.00371",
        triples=(
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
    ),
}
if TYPE_CHECKING:
    SetName = str
else:
    SetName = Literal[tuple(SETS)]


def coefficient_set(name: str) -> CoefficientSet:
    """Return the set of that name. Raises ValueError: there is none."""
    if name not in SETS:
        raise ValueError(f"coefficients is {name!r}; known sets are {', '.join(SETS)}")
    return SETS[name]


def coefficient_schedule(name: str, steps: int) -> tuple[Coefficients, ...]:
    """Return one (a, b, c) for each of ``steps`` steps.

    Raises:
        ValueError: an unknown set, or no steps.
    """
    known = coefficient_set(name)
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return known.schedule(steps)


# Kinds of matrices that may have their own number of steps; the groups of metrics (optim/observing.py).
STEP_FAMILIES = ("attention", "mlp", "experts", "router")
# Singular values of any size that fp32 resolves are near 1 before.
MOST_STEPS = 30


@dataclass(frozen=True, slots=True)
class Steps:
    """Newton-Schulz steps of each kind of matrix.

    Attributes:
        base: steps of matrices that are of no kind in ``by_family``.
        by_family: steps of kinds, by keys of :data:`STEP_FAMILIES`.
    """

    base: int
    by_family: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None, coefficients: str) -> Steps:
        """Read "5", "experts=3" or "5,experts=3,router=4".

        Args:
            text: what was asked for; None or no plain number: as many as the set is made for.
            coefficients: a key of :data:`SETS`.

        Raises:
            UsageError: anything else, a number out of range, an unknown kind, or one that is named twice.
        """
        base, by_family = None, dict[str, int]()
        for item in [] if text is None else str(text).split(","):
            family, equals, number = (word.strip() for word in item.rpartition("="))
            if not equals and base is None:
                base = _steps(number, text)
            elif equals and family in STEP_FAMILIES and family not in by_family:
                by_family[family] = _steps(number, text)
            else:
                raise _unreadable(text)
        return cls(coefficient_set(coefficients).steps if base is None else base, by_family)

    def of(self, family: str | None) -> int:
        """Return the steps of a kind of matrix; ``None``: of every matrix.

        Raises:
            ValueError: asked for every matrix, where kinds differ.
        """
        if family is None and self.by_family:
            raise ValueError(f"Newton-Schulz steps differ by family ({self}); name one of {', '.join(STEP_FAMILIES)}")
        return self.by_family.get(family or "", self.base)

    def text(self, coefficients: str) -> str | None:
        """The shortest text from which these steps are read; None if they are those that the set is made for."""
        return None if self == Steps(coefficient_set(coefficients).steps) else str(self)

    def __str__(self) -> str:
        return ",".join([str(self.base), *(f"{family}={number}" for family, number in self.by_family.items())])


def _steps(number: str, text: str | None) -> int:
    if not (number.isascii() and number.isdigit() and len(number) < 10 and 1 <= int(number) <= MOST_STEPS):
        raise _unreadable(text)
    return int(number)


def _unreadable(text: str | None) -> UsageError:
    return UsageError(
        f"--ns-steps is {reprlib.repr(text)}; give a number from 1 to {MOST_STEPS}, and other numbers of families"
        f" after it, each once: 5,experts=3 (families are {', '.join(STEP_FAMILIES)})",
        same_on_all_ranks=True,
    )
