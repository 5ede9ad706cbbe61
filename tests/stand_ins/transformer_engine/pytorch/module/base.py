"""What Megatron-Core takes from the layers' base."""

from __future__ import annotations

from typing import Any

import torch


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, **_: Any) -> torch.Tensor:
    """A gradient that nobody reads."""
    return torch.zeros(shape, dtype=dtype)
