"""Optional libraries of CUDA machines: whether they can be used, and if not, why. The one place that looks for them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError

# Function of TransformerEngine's state manager that says whether a recipe can run, with a reason.
_AVAILABLE = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


@functools.cache
def lacks_transformer_engine() -> str | None:
    """Why TransformerEngine's layers cannot run here; None if they can."""
    if not device.has_cuda():
        return "there is no CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that was built for another PyTorch or CUDA may raise anything
        return f"it does not import ({_first_line(error)})"
    return None


def lacks_fp8(recipe: str) -> str | None:
    """Why TransformerEngine cannot run an FP8 recipe on this rank's GPU; None if it can.

    Args:
        recipe: a value of ``--fp8-recipe`` that TransformerEngine has.
    """
    lacking = lacks_transformer_engine()
    if lacking:
        return f"TransformerEngine's layers, and {lacking}"
    manager: Any = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    available, reason = getattr(manager, _AVAILABLE[recipe])()
    return None if available else f"another GPU or CUDA: {reason.rstrip('.')}"


def transformer_impl(asked: str | None, *, emulating: bool) -> tuple[str, str]:
    """Choose the layers that a model is built from.

    Args:
        asked: ``--transformer-impl``, or None for TransformerEngine's where they can run.
        emulating: whether FP8 is emulated, which Megatron-Core's local layers do.

    Returns:
        "local" or "transformer_engine", and why.

    Raises:
        UsageError: TransformerEngine is asked for and cannot run.
    """
    lacking = lacks_transformer_engine()
    if asked == "transformer_engine" and lacking:
        raise UsageError(
            f"--transformer-impl transformer_engine cannot run, {lacking}; give local, or leave it out; to install it:"
            " pip install megatron-hyperp[gpu]"
        )
    if asked:
        return asked, "as asked"
    if emulating:
        return "local", "for emulated FP8"
    return ("local", f"no TransformerEngine, {lacking}") if lacking else ("transformer_engine", "usable here")


def describe_layers(implementation: str, why: str) -> str:
    """One line on the layers in use."""
    if implementation == "local":
        return f"layers: Megatron-Core's local ones ({why})"
    version = getattr(importlib.import_module("transformer_engine"), "__version__", "of unknown version")
    return f"layers: TransformerEngine {version} ({why})"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:150]}"
