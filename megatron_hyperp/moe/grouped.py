"""All experts of a rank as one grouped matrix product, for Megatron-Core's ``TEGroupedMLP`` without TransformerEngine.

PyTorch's ``grouped_mm`` is one kernel under CUDA and a product per expert on CPU. Parameters are named ``weight0``,
``weight1``, ... as TransformerEngine's ``GroupedLinear`` names them, so that either loads the other's checkpoints.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.functional import grouped_mm

from megatron_hyperp.model.fp8 import Emulation


class _GroupedProduct(torch.autograd.Function):
    """x W_i^T for the rows of each group i.

    The kernel wants the weights as one tensor. That copy is made anew for the backward pass instead of being kept: it
    would hold the experts of all layers a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = grouped_mm(gradient, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        return to_x, None, *grouped_mm(gradient.T, x, offs=ends).unbind()


def grouped_product(x: torch.Tensor, rows: list[int], weights: list[torch.Tensor]) -> torch.Tensor:
    """Multiply each group of rows by the transpose of its own matrix.

    Args:
        x: [tokens, d_in], sorted by group. Sizes of rows must be multiples of 16 bytes.
        rows: how many of them each group has; may be 0.
        weights: [d_out, d_in] each.

    Returns:
        [tokens, d_out].
    """
    ends = torch.tensor(list(accumulate(rows)), dtype=torch.int32, device=x.device)
    return _GroupedProduct.apply(x, ends, *weights)  # type: ignore[no-untyped-call]


class GroupedLinear(torch.nn.Module):
    """The same linear layer of every local expert, without bias.

    Args:
        num_gemms: local experts.
        input_size: global d_in.
        output_size: global d_out.
        split: dimension of [d_out, d_in] that is shared out over the expert-tensor-parallel ranks.
        config: of the model.
        pg_collection: Megatron-Core's process groups.
    """

    # Emulation of FP8, where a recipe applies to the layer.
    fp8: Emulation | None = None

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        split: int,
        config: TransformerConfig,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self._split = split
        self._groups = pg_collection
        shape = [output_size, input_size]
        shape[split] //= pg_collection.expt_tp.size()
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            self.register_parameter(f"weight{number}", weight)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The experts' matrices, [d_out, d_in] each; this rank's part of them."""
        return [getattr(self, f"weight{number}") for number in range(self.num_gemms)]

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        """Return the product and no bias; x is [tokens, d_in], ``m_splits`` the tokens of each expert."""
        if self.fp8 is None:
            return grouped_product(x, m_splits, self.weights), None
        weights = [self.fp8.weight(weight, expert) for expert, weight in enumerate(self.weights)]
        return self.fp8.output(grouped_product(self.fp8.input(x, m_splits), m_splits, weights), m_splits), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Describe each matrix as the global expert that it is, under the key that all experts share."""
        assert metadata is not None
        experts = self._groups.ep
        result = {}
        for number, weight in enumerate(self.weights):
            index = experts.rank() * self.num_gemms + number
            offsets = (*sharded_offsets, (len(sharded_offsets), index, experts.size() * self.num_gemms))
            entry = make_sharded_tensors_for_checkpoint(
                {"weight": weight},
                "",
                {"weight": self._split},
                offsets,
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(entry, "", prefix)
            [described] = entry.values()
            # Copies of an expert lie along the expert-data-parallel ranks.
            described.replica_id = (*described.replica_id[:2], self._groups.expt_dp.rank())
            result[f"{prefix}weight{number}"] = described
        return result
