"""Delayed scaling of FP8: a tensor's scale follows from its largest elements in earlier steps.

The numbers are TransformerEngine's (``DelayedScaling`` of transformer_engine/common/recipe, the kernel in
common/recipe/delayed_scaling.cu): a scale is 1 at first, then the format's largest number over 2^margin and over the
largest element of the history; where that is 0 or not finite it stays. Every expert has scales of its own. Two things
differ. TransformerEngine updates scales after each micro-batch, at the end of its passes; here all micro-batches of a
step have the same scales and fill the same entry, so that their number does not matter. And here the entry is reduced
over all ranks, not over those of tensor and data parallelism alone: ranks without a tensor add zeros, and every rank
then knows every scale, which makes checkpoints independent of the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.model.fp8 import Emulation, Fp8Recipe, Role, largest_elements, of_rows
from megatron_hyperp.numerics.fp8 import LARGEST, round_trip

ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


class DelayedScales:
    """The scales of all tensors that the linear layers of a model round, on every rank.

    Args:
        recipe: formats.
        layers: of the whole model.
        matrices: of a layer, those of each expert counted.
        length: steps of the history, the running one included.
        algo: a scale follows from the largest of the history, or from the most recent step.
        margin: powers of two between the largest element and the format's largest number.
    """

    def __init__(
        self,
        recipe: Fp8Recipe,
        *,
        layers: int,
        matrices: int,
        length: int = 1,
        algo: Literal["most_recent", "max"] = "most_recent",
        margin: int = 0,
    ) -> None:
        home, shape = device.device(), (len(ROLES), layers, matrices)
        self.scales = torch.ones(shape, device=home)
        # The newest step first: the running one, to which micro-batches add.
        self.history = torch.zeros((length, *shape), device=home)
        self._algo = algo
        largest = [LARGEST[recipe.format(role)] / 2**margin for role in ROLES]
        self._largest = torch.tensor(largest, device=home).view(-1, 1, 1)

    def record(self, amax: torch.Tensor, role: Role, layer: int, matrices: slice) -> None:
        """Take the largest elements of one layer's tensors into account; twice is as good as once.

        Args:
            amax: one value for each matrix; NaN counts for nothing, as in TransformerEngine's kernels.
            role: what the tensors are.
            layer: its number in the whole model, from 0.
            matrices: which of the layer's.
        """
        entry = self.history[0, ROLES.index(role), layer, matrices]
        torch.fmax(entry, amax, out=entry)

    def finish(self) -> None:
        """End a step: derive the next one's scales; a collective call of all ranks."""
        dist.all_reduce(self.history[0], op=dist.ReduceOp.MAX)
        amax = self.history.amax(dim=0) if self._algo == "max" else self.history[0]
        scales = (self._largest / amax).clamp_max(torch.finfo(torch.float32).max)
        self.scales = torch.where((amax > 0) & amax.isfinite(), scales, self.scales)
        self.history = self.history.roll(1, dims=0)
        self.history[0] = 0

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, on the CPU; the same on all ranks between steps."""
        return {"scales": self.scales.cpu(), "history": self.history.cpu()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the state of a checkpoint; of a history of another length the newest steps."""
        self.scales = state["scales"].to(self.scales)
        kept = min(len(self.history), len(state["history"]))
        self.history[:kept] = state["history"][:kept].to(self.history)


@dataclass(frozen=True, slots=True)
class DelayedEmulation(Emulation):
    """The roundings around one layer's products, with scales from earlier steps.

    Attributes:
        scales: of the whole model.
        layer: number of the transformer layer in the model, from 0.
        first: number of the (first local expert's) matrix in that layer.
        module: the linear layer; its largest elements count while it trains.
    """

    scales: DelayedScales
    layer: int
    first: int
    module: torch.nn.Module

    def rounded(
        self, value: torch.Tensor, role: Role, *, rows: list[int] | None = None, expert: int = 0
    ) -> torch.Tensor:
        """Round a tensor with the scale of this step, and note its largest element for later ones."""
        first = self.first + expert
        matrices = slice(first, first + (1 if rows is None else len(rows)))
        if self.module.training:
            self.scales.record(largest_elements(value, rows), role, self.layer, matrices)
        scale = self.scales.scales[ROLES.index(role), self.layer, matrices]
        return round_trip(value, self.recipe.format(role), of_rows(scale, rows))


def build_scales(config: Config) -> DelayedScales | None:
    """Return the scales that all layers share under emulated delayed scaling; None otherwise."""
    training, moe = config.training, config.moe
    if training.fp8_format == "none" or training.fp8_recipe != "delayed" or not training.fp8_emulation:
        return None
    # Two of attention, two of each MLP.
    mlps = moe.num_experts + bool(moe.moe_shared_expert_intermediate_size) if moe.num_experts else 1
    return DelayedScales(
        Fp8Recipe("e5m2" if training.fp8_format == "hybrid" else "e4m3"),
        layers=config.model.num_layers,
        matrices=2 + 2 * mlps,
        length=training.fp8_amax_history_len,
        algo=training.fp8_amax_compute_algo,
        margin=training.fp8_margin,
    )
