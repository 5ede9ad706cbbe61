"""Optional libraries of CUDA machines, and which of several ways a run takes. The one place that looks for them."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError

TRANSFORMER_ENGINE = "transformer_engine.pytorch"
CROSS_ENTROPY = "transformer_engine.pytorch.cross_entropy"
# Of NVIDIA's apex, built with --cpp_ext --cuda_ext: adds gradients to fp32 sums.
ACCUMULATION_FUSION = "fused_weight_gradient_mlp_cuda"
# Function of TransformerEngine's state manager that says whether a recipe can run, with a reason.
_AVAILABLE = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def lacks(extension: str) -> str | None:
    """Return what is missing for a CUDA extension, by its module's name; None if it can be used."""
    if not device.has_cuda():
        return "CUDA"
    try:
        importlib.import_module(extension)
    except Exception as error:  # a build for another CUDA, torch or C library fails in any way
        return f"{extension}, which cannot be imported ({' '.join(str(error).split())})"
    return None


def lacks_fp8(recipe: str) -> str | None:
    """Return what is missing for TransformerEngine to run an FP8 recipe on this rank's GPU; None if it can.

    Args:
        recipe: a value of ``--fp8-recipe`` that TransformerEngine has.
    """
    lacking = lacks(TRANSFORMER_ENGINE)
    if lacking:
        return lacking
    manager: Any = importlib.import_module(f"{TRANSFORMER_ENGINE}.fp8").FP8GlobalStateManager
    available, reason = getattr(manager, _AVAILABLE[recipe])()
    return None if available else f"another GPU or CUDA ({reason.rstrip('.')})"


def implementation(config: Config) -> tuple[str, str]:
    """Return the layers that the model is built from, "local" or "transformer_engine", and why.

    Raises:
        UsageError: TransformerEngine is asked for and cannot run.
    """
    asked, lacking = config.training.transformer_impl, lacks(TRANSFORMER_ENGINE)
    if asked == "transformer_engine" and lacking:
        raise UsageError(
            f"--transformer-impl transformer_engine needs {lacking}; give local, or leave it out; to install it:"
            " pip install megatron-hyperp[gpu]",
            # What one node with GPUs lacks, another may have: there each rank says so itself.
            same_on_all_ranks=not device.has_cuda(),
        )
    if asked:
        return asked, "as asked"
    if config.training.fp8_emulation:
        return "local", "for emulated FP8"
    return ("local", f"TransformerEngine needs {lacking}") if lacking else ("transformer_engine", "usable here")


def attention(config: Config) -> str:
    """Return the core attention: "local" (unfused), "sdpa" or "transformer_engine"."""
    training = config.training
    if training.attention_backend is None and implementation(config)[0] == "transformer_engine":
        return "transformer_engine"
    return training.local_attention


def fuses_accumulation(config: Config) -> bool:
    """Whether products add weight gradients to the sums themselves: as asked, else where they can.

    TransformerEngine's can; Megatron-Core's, the output layer's among them, need apex's kernel.
    """
    asked = config.training.gradient_accumulation_fusion
    if asked is None:
        return not config.training.fp8_emulation and lacks(ACCUMULATION_FUSION) is None
    return asked


def describe(config: Config) -> str:
    """One line on what the model is built from, of what there is to choose from."""
    layers, why = implementation(config)
    name = "Megatron-Core's local ones"
    if layers == "transformer_engine":
        name = f"TransformerEngine {getattr(importlib.import_module('transformer_engine'), '__version__', '')}".strip()
    cores = {"local": "unfused attention", "sdpa": "torch's fused attention", "transformer_engine": "its attention"}
    sums = "with" if fuses_accumulation(config) else "without"
    return f"layers: {name} ({why}), {cores[attention(config)]}, {sums} apex's accumulation of gradients"
