"""Random states and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    """Megatron-Core derives one of its own from it, which this trainer does not use."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute in the backward pass, under the recipe of the forward pass."""
    from .fp8 import FP8GlobalStateManager, fp8_autocast

    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name)
    recipe = FP8GlobalStateManager.recipe

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe)

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def activation_recompute_forward(**_: Any) -> Any:
    """Nothing to note."""
    return nullcontext()
