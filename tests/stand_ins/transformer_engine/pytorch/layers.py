"""Linear layers, alone, behind a norm, and grouped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from torch.nn.functional import linear, rms_norm

from .fp8 import FP8GlobalStateManager

if TYPE_CHECKING:
    from megatron_hyperp.model.fp8 import Emulation


class _Alone:
    """A group of one rank: the stand-in's scales are those of the rank's own tensors."""

    def size(self) -> int:
        return 1


def _emulation() -> Emulation | None:
    # Megatron-Core imports this library while it is itself imported.
    from megatron_hyperp.model.fp8 import Emulation, Fp8Recipe

    recipe = FP8GlobalStateManager.recipe
    if recipe is None:
        return None
    _, backward = recipe.fp8_format.value
    return Emulation(Fp8Recipe(gradients=backward, scaling=recipe.scaling), _Alone())  # type: ignore[arg-type]


class _Base(torch.nn.Module):
    """Marks, communication and rounding that all layers share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        column, row = parallel_mode == "column", parallel_mode == "row"
        self.parallel_mode = parallel_mode
        self.in_features = in_features // tp_size if row else in_features
        self.out_features = out_features // tp_size if column else out_features
        self.tp_group, self.tp_size = tp_group, tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.use_bias = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = self.save_original_input = False
        self._placed = {"dtype": params_dtype, "device": device}
        # Rounded weights of this step: stale ones would show if nobody said when a step begins.
        self._kept: dict[str, torch.Tensor] = {}

    def _weight(self, name: str) -> None:
        weight = Parameter(torch.empty(self.out_features, self.in_features, **self._placed))
        self.register_parameter(name, weight)
        if self.parallel_mode is not None:
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = 0 if self.parallel_mode == "column" else 1  # type: ignore[attr-defined]

    def _rounded(self, name: str, fp8: Emulation | None, is_first_microbatch: bool | None) -> torch.Tensor:
        weight: torch.Tensor = getattr(self, name)
        if fp8 is None:
            return weight
        if is_first_microbatch is None or is_first_microbatch or name not in self._kept:
            self._kept[name] = fp8.weight(weight.detach())
        return _Replaced.apply(weight, self._kept[name])  # type: ignore[no-untyped-call,no-any-return]

    def _before(self, x: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _after(self, y: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "row" or self.tp_size == 1:
            return y
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)

    def get_extra_state(self) -> torch.Tensor:
        """No history."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Nothing to take up."""
        assert state is None or state.numel() == 0


class _Replaced(torch.autograd.Function):
    """Another value for a weight, which gets its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        del ctx, weight
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        del ctx
        return gradient, None


def _product(x: torch.Tensor, weight: torch.Tensor, fp8: Emulation | None) -> torch.Tensor:
    return linear(x, weight) if fp8 is None else fp8.output(linear(fp8.input(x), weight))


class Linear(_Base):
    """y = x W^T."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weight("weight")

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """Multiply [..., in]."""
        fp8 = _emulation()
        return self._after(_product(self._before(x), self._rounded("weight", fp8, is_first_microbatch), fp8))


class LayerNormLinear(Linear):
    """y = norm(x) W^T."""

    def __init__(self, *args: Any, eps: float, normalization: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones(self.in_features, **self._placed))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """Normalize and multiply [..., in]."""
        x = rms_norm(x, (self.in_features,), self.layer_norm_weight, self.eps)
        return super().forward(x, is_first_microbatch)


class GroupedLinear(_Base):
    """One product per group of rows."""

    def __init__(self, num_gemms: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_gemms = num_gemms
        for number in range(num_gemms):
            self._weight(f"weight{number}")

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        """Multiply [rows, in]; ``m_splits`` are rows per group."""
        fp8 = _emulation()
        weights = [self._rounded(f"weight{number}", fp8, is_first_microbatch) for number in range(self.num_gemms)]
        parts = [_product(part, weight, fp8) for part, weight in zip(x.split(m_splits), weights, strict=True)]
        return torch.cat(parts)

    def init_fp8_metadata(self, num_gemms: int) -> None:
        """Nothing to prepare."""


class RMSNorm(torch.nn.Module):
    """RMSNorm with a gain."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        eps: float,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: Any = None,
        hidden_size: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        # By its older name.
        size = hidden_size if normalized_shape is None else normalized_shape
        assert size is not None
        self.weight = Parameter(torch.ones(size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class Fp8Padding(torch.nn.Module):
    """Rows of zeros that make every group a multiple of 16 long."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        assert align_size is None
        self.num_gemms = num_gemms

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Pad [rows, columns]."""
        parts = [torch.nn.functional.pad(part, (0, 0, 0, -len(part) % 16)) for part in x.split(m_splits)]
        return torch.cat(parts), [len(part) for part in parts]


class Fp8Unpadding(torch.nn.Module):
    """What :class:`Fp8Padding` added, taken away."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        assert align_size is None
        self.num_gemms = num_gemms

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        """Unpad [rows, columns] to the splits before."""
        padded = [size + -size % 16 for size in m_splits]
        return torch.cat([part[:size] for part, size in zip(x.split(padded), m_splits, strict=True)])
