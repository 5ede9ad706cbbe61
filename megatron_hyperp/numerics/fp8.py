"""Rounding to FP8 (Micikevicius et al., arXiv 2209.05433), and where the scale of a weight comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Format = Literal["e4m3", "e5m2"]
DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}


def round_trip(x: torch.Tensor, fmt: Format, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8 and back: x times ``scale``, clamped to the format's range, over ``scale``.

    Args:
        x: of any floating dtype, which the result keeps.
        fmt: a key of :data:`DTYPES`.
        scale: broadcasts against x.
    """
    return (encoded(x, fmt, scale).float() / scale).to(x.dtype)


def encoded(x: torch.Tensor, fmt: Format, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8: x times ``scale``, clamped to the format's range, in the format's dtype; else as round_trip."""
    largest = LARGEST[fmt]
    return (x.float() * scale).clamp(-largest, largest).to(DTYPES[fmt])


def scale_of(amax: torch.Tensor, fmt: Format, *, power_of_two: bool = False) -> torch.Tensor:
    """Return what brings the largest element to the format's largest number; 1 where all elements are 0.

    Args:
        amax: largest absolute values.
        fmt: a key of :data:`DTYPES`.
        power_of_two: take the next power of two below, as e8m0 scales do.
    """
    scale = torch.where(amax > 0, LARGEST[fmt] / amax.clamp_min(1e-30), torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


@dataclass(frozen=True, slots=True)
class WeightScale:
    """Where the scale of a weight comes from, tensorwise.

    Attributes:
        fixed: the scale itself, of the sphere; None: from the largest element.
        group: ranks that hold the other parts of the matrix and share its scale; None where each part has its own.
    """

    fixed: float | None
    group: dist.ProcessGroup | None
