"""What is changed in Megatron-Core before anything is built with it."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

import torch

from megatron_hyperp.megatron_compat.cpu import adapt_torch


def adapt(*, cuda: bool) -> None:
    """Make Megatron-Core run on this device and correct what is wrong in it; call once.

    Args:
        cuda: whether this process computes on a CUDA device; otherwise on the CPU, with gloo.
    """
    _quiet()
    if not cuda:
        adapt_torch()
        _split_sizes_as_numbers()
    _allow_experts_without_transformer_engine()
    _reduce_any_layout()


def _quiet() -> None:
    """Silence notices that users can do nothing about: deprecations inside Megatron-Core and torch's collectives."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _allow_experts_without_transformer_engine() -> None:
    """Define TransformerEngine's product as absent: 0.16.1's router reads the name before it asks whether it exists."""
    utilities: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utilities, "te_general_gemm"):
        utilities.te_general_gemm = None


def _split_sizes_as_numbers() -> None:
    """Make the token dispatcher's split sizes numbers: a tensor that is on the CPU already would stay one."""
    utilities: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = utilities.maybe_move_tensor_to_cpu

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    utilities.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _reduce_any_layout() -> None:
    """Let tensor-parallel all-reduces sum tensors that are not contiguous.

    Up to 0.18.2 ``_reduce`` sums a contiguous copy of such a tensor and returns the tensor itself, not summed. The
    copy is made here, as 0.19.2 makes it, so that what is returned is what was summed.
    """
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    original = mappings._reduce

    @functools.wraps(original)
    def reduce(input_: torch.Tensor, group: Any) -> torch.Tensor:
        return original(input_.contiguous(), group)

    mappings._reduce = reduce
