"""CUDA's names in torch, pointed at the CPU.

Megatron-Core names CUDA directly in many places. Without CUDA, "the current CUDA device" is the CPU, streams and events
do nothing (a CPU runs in order), and CUDA's random state is the CPU generator's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
# Tensor factories whose ``device="cuda"`` means the CPU.
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor")


class _Stream:
    """A CUDA stream or event on a device that runs in order: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


_STREAM = _Stream()

# What takes the place of each name in torch.cuda.
CUDA_NAMES: dict[str, Callable[..., Any] | type] = {
    "current_device": lambda: _CPU,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "Stream": _Stream,
    "Event": _Stream,
    "current_stream": lambda *_, **__: _STREAM,
    "default_stream": lambda *_, **__: _STREAM,
    "stream": lambda *_: contextlib.nullcontext(),
}
# And in torch.cuda and torch.cuda.random. ``torch.manual_seed`` itself calls CUDA's: not used here.
RANDOM_NAMES: dict[str, Callable[..., Any]] = {
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
    "manual_seed_all": lambda seed: None,
}


def adapt_torch() -> None:
    """Point CUDA's names in torch, and those that Megatron-Core has imported from it, at the CPU; call once."""
    cuda: Any = torch.cuda
    for name, replacement in CUDA_NAMES.items():
        setattr(cuda, name, replacement)
    methods: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.Tensor, "record_stream", lambda self, _: None),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
        (torch.nn.Module, "cuda", lambda self, *_, **__: self),
    ]
    for owner, name, method in methods:
        setattr(owner, name, method)
    remember_factories("cpu")
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for module in (cuda, cuda.random):
        for name, replacement in RANDOM_NAMES.items():
            setattr(module, name, replacement)
    cuda.default_generators = _Generators()
    # Megatron-Core's module has imported both names.
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    for module in (cuda, random):
        module._lazy_init = lambda: None
        module._lazy_call = lambda function, **_: function()


def remember_factories(device: str) -> None:
    """Let a device's context note which tensor factories it applies to; later it would not know the replaced ones."""
    with torch.device(device):
        torch.empty(0)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


class _Generators:
    """Stands for ``torch.cuda.default_generators``: every index is the CPU generator."""

    def __getitem__(self, _: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1
