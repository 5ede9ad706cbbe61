"""Laws of learning rates per role: what embedding, output layer, router, gains and matrices take of the shared rate.

A role's learning rate is eta x factor (w/w0)^a (d/d0)^b (T/T0)^c (B/B0)^e, with eta the learning rate that all roles
share (``megatron_hyperp.transfer``). In the paper (arXiv 2603.28743) all roles take eta itself: every factor is 1 and
every exponent 0. Every function is pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from megatron_hyperp.errors import UsageError

# Name of a law, its formula with numbers, its value.
Factor = tuple[str, str, float]

# Roles that have a law of their own, as reports name them. Gains on queries and keys take the law of gains, with a
# further factor.
ROLES = {
    "hidden": "hidden matrices",
    "router": "router",
    "output": "output layer",
    "embedding": "embedding",
    "vector": "gains and biases",
}
QK_GAINS = "qk_norm"
TITLES = ROLES | {QK_GAINS: "gains on queries and keys"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What learning rates scale with.

    Attributes:
        width: hidden size w.
        depth: number of layers d.
        tokens: training tokens T.
        batch: tokens per global batch B.
    """

    width: float
    depth: float
    tokens: float
    batch: float


AXES = tuple(item.name for item in fields(Sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleLaw:
    """A factor times powers of a model's sizes over those of the base model.

    Attributes:
        factor: the constant.
        width: exponent of w/w0.
        depth: of d/d0.
        tokens: of T/T0.
        batch: of B/B0.
    """

    factor: float = 1.0
    width: float = 0.0
    depth: float = 0.0
    tokens: float = 0.0
    batch: float = 0.0

    def powers(self, sizes: Sizes, base: Sizes) -> tuple[Factor, ...]:
        """Return the powers whose exponent is not 0.

        Raises:
            OverflowError: one is too large for a float.
        """
        return tuple(
            (axis, _formula(axis, getattr(sizes, axis), getattr(base, axis), exponent), value)
            for axis in AXES
            if (exponent := getattr(self, axis))
            for value in [_power(getattr(sizes, axis), getattr(base, axis), exponent)]
        )

    def multiplier(self, sizes: Sizes, base: Sizes) -> float:
        """Return the factor times all powers. Raises: as :meth:`powers`."""
        return math.prod((value for _, _, value in self.powers(sizes, base)), start=self.factor)


def _power(size: float, base: float, exponent: float) -> float:
    """(size/base)^exponent; exponents of 1 and -1 give the plain quotients, to the last bit."""
    return float((size / base) ** exponent if exponent > 0 else (base / size) ** -exponent)


def _formula(axis: str, size: float, base: float, exponent: float) -> str:
    top, bottom = (f"{value:.4g}" if axis == "tokens" else f"{value:,.0f}" for value in (size, base))
    unit = " tokens" if axis == "batch" else ""
    ratio = top + unit if base == 1 else f"({top} / {bottom}{unit})"
    return f"sqrt{ratio}" if exponent == 0.5 else f"{ratio}^{exponent:g}"


@dataclass(frozen=True, slots=True)
class RoleRate:
    """What a role takes of the shared learning rate.

    Attributes:
        role: a key of :data:`TITLES`.
        factor: the constant of its law.
        powers: the rest of it.
    """

    role: str
    factor: float
    powers: tuple[Factor, ...]

    @property
    def multiplier(self) -> float:
        """Product of the factor and all powers."""
        return math.prod((value for _, _, value in self.powers), start=self.factor)

    def describe(self, shared: float) -> str:
        """Return one line: the role's learning rate for a shared one, and what it is made of."""
        made_of = [f"{self.factor:.4g}"] if self.factor != 1 or not self.powers else []
        made_of += [f"{value:.4g} ({name}: {formula})" for name, formula, value in self.powers]
        return f"{TITLES[self.role]}: {shared * self.multiplier:.6g} = learning rate x {' x '.join(made_of)}"


def role_laws(
    *,
    factors: Mapping[str, float],
    qk_factor: float = 1.0,
    width_mup: bool = False,
    exponents: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, RoleLaw]:
    """Return the law of every role, a key of :data:`TITLES`.

    Args:
        factors: by role; 1 where there is none.
        qk_factor: further factor of the gains on queries and keys.
        width_mup: whether matrices of transformer layers take w0/w (muP for Adam, Tensor Programs V).
        exponents: by role and axis, as :func:`parse_exponents` gives them; they replace muP's.
    """
    laws = {}
    for role in ROLES:
        width = -1.0 if width_mup and role in ("hidden", "router") else 0.0
        powers = {"width": width} | dict((exponents or {}).get(role, {}))
        laws[role] = RoleLaw(factor=factors.get(role, 1.0), **powers)
    laws[QK_GAINS] = replace(laws["vector"], factor=laws["vector"].factor * qk_factor)
    return laws


def parse_exponents(words: Iterable[str]) -> dict[str, dict[str, float]]:
    """Read ``ROLE:AXIS=EXPONENT[,AXIS=EXPONENT]...``, a word for each role, into exponents by role and axis.

    Raises:
        UsageError: a word is none; its role or axis is unknown or has been given; an exponent is no finite number.
    """
    result: dict[str, dict[str, float]] = {}
    for word in " ".join(words).split():
        role, colon, powers = word.partition(":")
        if not colon or role not in ROLES:
            raise UsageError(
                f"--lr-exponents {word}: give ROLE:AXIS=EXPONENT, such as embedding:width=-0.5,depth=0; roles are"
                f" {', '.join(ROLES)}"
            )
        for power in powers.split(","):
            axis, _, number = power.partition("=")
            if axis not in AXES:
                raise UsageError(f"--lr-exponents {word}: {axis!r} is no axis; axes are {', '.join(AXES)}")
            if axis in result.setdefault(role, {}):
                raise UsageError(f"--lr-exponents {word}: {role} has an exponent of {axis} already; give one")
            result[role][axis] = _exponent(number, word)
    return result


def _exponent(text: str, word: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--lr-exponents {word}: the exponent {text!r} must be a finite number, such as -0.5")
    return value
