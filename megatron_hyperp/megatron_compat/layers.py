"""Tensor-parallel linear layers of Megatron-Core whose matrix product can be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as _ColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as _RowParallelLinear

# Takes an input [..., d_in] and a weight [d_out, d_in], and returns [..., d_out].
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _WithProduct:
    """A layer that asks :meth:`multiply` for its product."""

    def multiply(self, product: Product, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the product of an input [..., d_in] and a weight [d_out, d_in]."""
        return product(x, weight)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        original = super()._forward_impl  # type: ignore[misc]  # Megatron-Core's layer, the other base class
        return self.multiply(lambda x, matrix: original(x, matrix, *args, **kwargs), input, weight)


class ColumnParallelLinear(_WithProduct, _ColumnParallelLinear):  # type: ignore[misc]  # Megatron-Core has no types
    """Megatron-Core's column-parallel layer."""


class RowParallelLinear(_WithProduct, _RowParallelLinear):  # type: ignore[misc]  # Megatron-Core has no types
    """Megatron-Core's row-parallel layer."""
