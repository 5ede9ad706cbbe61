"""FP8 recipes: what they are told."""

from __future__ import annotations

import enum
from typing import Any


class Format(enum.Enum):
    """Formats of forward and backward pass."""

    E4M3 = ("e4m3", "e4m3")
    HYBRID = ("e4m3", "e5m2")


class Recipe:
    """Any recipe."""

    scaling = ""

    def __init__(self, fp8_format: Format = Format.HYBRID, **settings: Any) -> None:
        self.fp8_format = fp8_format
        self.settings = settings


class DelayedScaling(Recipe):
    """Scales of earlier steps; the stand-in rounds as :class:`Float8CurrentScaling`."""

    scaling = "tensorwise"


class Float8CurrentScaling(Recipe):
    """A scale per tensor."""

    scaling = "tensorwise"


class Float8BlockScaling(Recipe):
    """A scale per block."""

    scaling = "blockwise"


class MXFP8BlockScaling(Recipe):
    """A power of two per block of 32."""

    scaling = "mxfp8"
