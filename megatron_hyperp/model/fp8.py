"""FP8 arithmetic of linear layers, emulated: values are rounded to FP8 and back, products are in the usual precision.

What is rounded is what TransformerEngine rounds (Micikevicius et al., arXiv 2209.05433): inputs and weights of the
linear layers inside transformer layers to e4m3, gradients of their outputs to e5m2 ("hybrid") or e4m3. Router,
embedding, output layer, norms and attention stay as they are. Casts saturate. One difference remains: the backward
products use the inputs and weights that the forward product used, while TransformerEngine scales those anew along the
other dimension where scales are per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hyperp.config import Config
from megatron_hyperp.megatron_compat.layers import ColumnParallelLinear, Product, RowParallelLinear
from megatron_hyperp.numerics.fp8 import LARGEST, Format, WeightScale, round_trip, scale_of
from megatron_hyperp.optim.sphere import muonh_radius
from megatron_hyperp.parameters import global_shape, is_expert, is_rounded

Scaling = Literal["tensorwise", "rowwise", "blockwise", "mxfp8"]
Role = Literal["input", "weight", "gradient"]
# Elements of a row that share a scale; blockwise scales of weights are those of squares (arXiv 2412.19437).
BLOCK = {"blockwise": 128, "mxfp8": 32}
# A weight this many times the RMS is clipped under static scales. Trained matrices on their spheres stay far below it,
# and 448 / 64 leaves nine powers of two between the RMS and e4m3's smallest normal number.
SPHERE_CLIP = 64.0


@dataclass(frozen=True, slots=True)
class Fp8Recipe:
    """How values are rounded.

    Attributes:
        gradients: format of gradients; inputs and weights are e4m3.
        scaling: which elements share a scale: all of a tensor, a row's, or a block's. Delayed scaling does not ask.
        static_weights: scales of weights follow from the radius of their sphere, instead of the largest element.
        radius_scale: factor on radii.
    """

    gradients: Format = "e5m2"
    scaling: Scaling = "tensorwise"
    static_weights: bool = False
    radius_scale: float = 1.0

    def format(self, role: Role) -> Format:
        """The format of inputs, weights or gradients."""
        return self.gradients if role == "gradient" else "e4m3"


def largest_elements(x: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """Return the largest absolute values, fp32; 0 of nothing.

    Args:
        x: any tensor; [tokens, columns] if rows are given.
        rows: how many tokens each expert has, or None.

    Returns:
        [experts], or [1] without.
    """
    parts = [x.detach()] if rows is None else x.detach().split(rows)
    none = torch.zeros((), device=x.device)
    return torch.stack([part.abs().amax().float() if part.numel() else none for part in parts])


def of_rows(scales: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """Repeat each expert's scale for its tokens: [tokens, 1]; without ``rows`` as it is."""
    if rows is None:
        return scales
    return scales.repeat_interleave(torch.tensor(rows, device=scales.device)).unsqueeze(1)


def quantized(
    x: torch.Tensor,
    fmt: Format,
    scaling: Scaling,
    *,
    group: dist.ProcessGroup | None = None,
    square: bool = False,
    rows: list[int] | None = None,
) -> torch.Tensor:
    """Round to FP8 and back with scales from the largest elements.

    Args:
        x: [..., columns]; products contract over the columns.
        fmt: a key of :data:`DTYPES`.
        scaling: which elements share a scale.
        group: ranks that hold the other parts of the tensor: "tensorwise" is the same however it is sharded.
        square: "blockwise" takes squares of a matrix, instead of runs of a row.
        rows: how many of the rows each expert has, which "tensorwise" gives a scale each.
    """
    if scaling == "tensorwise":
        amax = largest_elements(x, rows)
        if group is not None and group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        return round_trip(x, fmt, of_rows(scale_of(amax, fmt), rows))
    if not x.numel():
        return x
    if scaling == "rowwise":
        return round_trip(x, fmt, scale_of(x.detach().abs().amax(dim=-1, keepdim=True).float(), fmt))
    size = BLOCK[scaling]
    flat = x.reshape(-1, x.shape[-1])
    tall = size if square and scaling == "blockwise" else 1
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % size, 0, -flat.shape[0] % tall))
    blocks = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // size, size)
    amax = blocks.detach().abs().amax(dim=(1, 3), keepdim=True).float()
    rounded = round_trip(blocks, fmt, scale_of(amax, fmt, power_of_two=scaling == "mxfp8"))
    return rounded.reshape(padded.shape)[: flat.shape[0], : flat.shape[1]].reshape(x.shape)


def sphere_scale(shape: tuple[int, ...], radius_scale: float) -> float:
    """Return the static scale of a matrix on its sphere, a power of two: its RMS is R / sqrt(d_out d_in)."""
    rms = muonh_radius(shape[0], radius_scale) / (shape[0] * shape[1]) ** 0.5
    return float(torch.exp2(torch.floor(torch.log2(torch.tensor(LARGEST["e4m3"] / (SPHERE_CLIP * rms))))))


def fp8_layers(chunk: torch.nn.Module, config: Config) -> Iterator[Any]:
    """Yield the transformer layers of a chunk that run in FP8: all but the first and last that are kept out of it."""
    training = config.training
    last = config.model.num_layers - training.num_layers_at_end_in_bf16
    layer: Any
    for layer in chunk.modules():
        if hasattr(layer, "self_attention") and training.num_layers_at_start_in_bf16 < layer.layer_number <= last:
            yield layer


def weight_scales(chunk: torch.nn.Module, config: Config) -> dict[torch.nn.Parameter, WeightScale]:
    """Return the weights that a chunk's layers round with one scale each, as their products do.

    Args:
        chunk: of the model, with Megatron's process groups.
        config: resolved; FP8 is on, and "tensorwise".
    """
    training = config.training
    tensor = parallel_state.get_tensor_model_parallel_group()
    expert_tensor = parallel_state.get_expert_tensor_parallel_group() if config.moe.num_experts else tensor
    found = {}
    for layer in fp8_layers(chunk, config):
        for name, parameter in layer.named_parameters():
            if not is_rounded(name, parameter):
                continue
            group = expert_tensor if is_expert(parameter) else tensor
            fixed = None
            if training.fp8_weight_scale == "sphere":
                fixed = sphere_scale(global_shape(parameter, group.size()), config.optimizer.radius_scale)
            # TransformerEngine scales each rank's part by itself.
            shared = training.fp8_emulation and fixed is None
            found[parameter] = WeightScale(fixed, group if shared else None)
    return found


class _StraightThrough(torch.autograd.Function):
    """Round on the way forward; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        del ctx
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        del ctx
        return gradient, None


class _RoundGradient(torch.autograd.Function):
    """Pass on the way forward; round the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.rounding(gradient), None


@dataclass(frozen=True, slots=True)
class Emulation:
    """The roundings around one layer's products.

    Attributes:
        recipe: how.
        group: tensor-parallel ranks that share the layer.
    """

    recipe: Fp8Recipe
    group: dist.ProcessGroup

    def input(self, x: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """Round an input [..., d_in]; ``rows`` are those of each expert."""
        return _StraightThrough.apply(x, lambda value: self.rounded(value, "input", rows=rows))  # type: ignore[no-untyped-call,no-any-return]

    def weight(self, weight: torch.Tensor, expert: int = 0) -> torch.Tensor:
        """Round a weight [d_out, d_in], of one of this rank's experts."""
        return _StraightThrough.apply(weight, lambda value: self.rounded(value, "weight", expert=expert))  # type: ignore[no-untyped-call,no-any-return]

    def output(self, y: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """Let the gradient of an output [..., d_out] be rounded; ``rows`` are those of each expert."""
        return _RoundGradient.apply(y, lambda value: self.rounded(value, "gradient", rows=rows))  # type: ignore[no-untyped-call,no-any-return]

    def rounded(
        self, value: torch.Tensor, role: Role, *, rows: list[int] | None = None, expert: int = 0
    ) -> torch.Tensor:
        """Round a tensor with scales from its own elements, or static ones."""
        del expert  # Where scales are kept, it says which.
        if role == "weight" and self.recipe.static_weights:
            scale = sphere_scale(global_shape(value, self.group.size()), self.recipe.radius_scale)
            return round_trip(value, "e4m3", torch.tensor(scale, device=value.device))
        fmt, scaling = self.recipe.format(role), self.recipe.scaling
        return quantized(value, fmt, scaling, group=self.group, square=role == "weight", rows=rows)


class _Emulated:
    """A linear layer of Megatron-Core in emulated FP8, where a recipe applies to its transformer layer."""

    fp8: Emulation | None = None

    def multiply(self, product: Product, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the product of an input [..., d_in] and a weight [d_out, d_in]."""
        if self.fp8 is None:
            return product(x, weight)
        return self.fp8.output(product(self.fp8.input(x), self.fp8.weight(weight)))


class Fp8ColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Megatron-Core's column-parallel layer, able to emulate FP8."""


class Fp8RowParallelLinear(_Emulated, RowParallelLinear):
    """Megatron-Core's row-parallel layer, able to emulate FP8."""
