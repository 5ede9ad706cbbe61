"""The one file that asks "CUDA or CPU?", and that lets Megatron-Core run on CPU with gloo.

Megatron-Core names CUDA directly in many places. Where CUDA is absent, :func:`adapt_megatron` points those names at
the CPU: "the current CUDA device" is the CPU, streams and events do nothing (a CPU runs in order), CUDA's random
state is the CPU generator's. Under CUDA it changes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GPUS, Gpu
from megatron_hyperp.launch import launch
from megatron_hyperp.rendezvous import meet

_CPU = torch.device("cpu")


# Set while models are built of tensors without memory.
_dry = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available() and not _dry


# Set while plans are made for another kind of device than this process computes on.
_target: str | None = None


@contextlib.contextmanager
def planning_for(kind: str) -> Iterator[None]:
    """Let costs be those of "cuda" or "cpu" for a while, wherever this process runs; nothing may be computed then."""
    global _target
    before, _target = _target, kind
    try:
        yield
    finally:
        _target = before


def target() -> str:
    """The kind of device, "cuda" or "cpu", that costs are counted for: this process's, unless it plans for another."""
    return _target or ("cuda" if has_cuda() else "cpu")


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """Let this process stand for a rank with CUDA for a while, its tensors without memory (torch's device "meta").

    On a machine with CUDA too, this adapts Megatron-Core to the CPU for the rest of the process.
    """
    global _dry
    with torch.device("meta"):
        torch.empty(0)  # torch notes now which functions obey it, and would not know the adapter's
    _dry = True
    try:
        adapt_megatron()
        with planning_for("cuda"), torch.device("meta"):
            yield
    finally:
        _dry = False


def device() -> torch.device:
    """The device of this rank's tensors."""
    if _dry:
        return torch.device("meta")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else _CPU


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of this rank's GPU, (9, 0) for Hopper; None on CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else None


def check_ranks() -> None:
    """See that this rank has a device of its own.

    Raises:
        UsageError: more ranks on this node than it has GPUs.
    """
    rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if has_cuda() and rank >= devices:
        raise UsageError(
            f"local rank {rank} has no GPU, this node has {devices}; start that many ranks per node, or set"
            " CUDA_VISIBLE_DEVICES= to run on CPU"
        )


def describe() -> str:
    """The device and the backend."""
    return f"{torch.cuda.get_device_name()}, NCCL" if has_cuda() else "CPU, gloo"


def newton_schulz_dtype(name: str, *, gram: bool = False) -> torch.dtype:
    """Resolve ``--ns-dtype``.

    ``auto`` is fp32 on CPU, where half precision is slower; under CUDA bf16, or fp16 if the Gram form is asked for, for
    which bf16 is too coarse.
    """
    if name == "auto":
        name = ("fp16" if gram else "bf16") if target() == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def symmetric_blocks(size: int) -> int:
    """Blocks per side in which to compute a symmetric [size, size] product, of which the lower ones are mirrored.

    On CPU that saves a third of the time from 128 rows on (benchmarks/optimizer_step); under CUDA, where small blocks
    waste the device, products stay whole.
    """
    if target() == "cuda" or size < 128:
        return 1
    return 4 if size < 512 else 8


# Two megabytes. Newton-Schulz reads each matrix in some ten products, one after another: runs of matrices that stay in
# the second-level cache meanwhile beat single calls, which start too many products, and batches of tens of megabytes,
# which fetch every operand from memory again. (tests/unit/test_batched_newton_schulz.py)
_NEWTON_SCHULZ_CHUNK = 1 << 21


def newton_schulz_chunk() -> int | None:
    """Bytes of matrices that Newton-Schulz takes at once on CPU; None under CUDA, which wants the whole batch."""
    return None if has_cuda() else _NEWTON_SCHULZ_CHUNK


def gpu() -> Gpu | None:
    """This rank's GPU by its data sheet, if it is a known one."""
    if not has_cuda():
        return None
    return next((kind for name, kind in GPUS.items() if name in torch.cuda.get_device_name()), None)


def peak_tflops() -> float | None:
    """Peak dense bf16 TFLOP/s of this device if it is a known one, for model FLOPs utilization."""
    known = gpu()
    return known.tflops if known else None


def megatron_settings() -> dict[str, Any]:
    """TransformerConfig fields that depend on the device."""
    # An output is freed as soon as its send has started. Streams order that under CUDA; gloo may still be reading it.
    return {"use_cpu_initialization": not has_cuda(), "deallocate_pipeline_outputs": has_cuda()}


def overlaps(asked: bool | None) -> bool:
    """Whether communication runs beside computation: as asked, else where streams make it pay."""
    return target() == "cuda" if asked is None else asked


def synchronize() -> None:
    """Wait for the device, so that a clock read next is right."""
    if has_cuda():
        torch.cuda.synchronize()


def init_process_group(timeout_minutes: float, run: str = "") -> None:
    """Join the job's process group: NCCL under CUDA, else gloo; alone, when no launcher set the environment.

    Args:
        timeout_minutes: of collectives, and for all ranks to come.
        run: what all ranks of the job have in common, and other jobs do not.

    Raises:
        UsageError: the launcher's variables are incomplete, or the port where ranks meet is another program's.
    """
    place = launch()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if has_cuda():
        torch.cuda.set_device(device())
    backend = "nccl" if has_cuda() else "gloo"
    if place is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Torchrun hosts the store itself.
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    store = torch.distributed.HashStore() if place is None else meet(place, run, timeout)
    rank, world_size = (0, 1) if place is None else (place.rank, place.world_size)
    torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


@functools.cache
def adapt_megatron() -> None:
    """Make Megatron-Core run on this device; does nothing under CUDA. Call before building anything with it."""
    _quiet_megatron()
    if not has_cuda():
        _adapt_torch()
        _adapt_random()
    _mend_experts()


def _quiet_megatron() -> None:
    """Silence notices that users can do nothing about: deprecations inside Megatron-Core and torch's collectives."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _mend_experts() -> None:
    """Mend two gaps of Megatron-Core's mixture of experts: without TransformerEngine, and on CPU."""
    utilities: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if not hasattr(utilities, "te_general_gemm"):
        # Asked for before it is looked whether there is one.
        utilities.te_general_gemm = None
    if has_cuda():
        return
    original = utilities.maybe_move_tensor_to_cpu

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Split sizes have to be numbers; a tensor that is on the CPU already would stay one.
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    utilities.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_cpu


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


class _TypeName(str):
    """A tensor type's name that equals its CUDA namesake: Megatron-Core's optimizers compare such strings."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._plain(self) == self._plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._plain(self))

    @staticmethod
    def _plain(name: str) -> str:
        return str(name).replace("torch.cuda.", "torch.")


def _adapt_torch() -> None:
    cuda = torch.cuda
    stream = _Stream()
    replacements: list[tuple[Any, str, Callable[..., Any] | type]] = [
        (cuda, "current_device", lambda: _CPU),
        (cuda, "synchronize", lambda *_, **__: None),
        (cuda, "empty_cache", lambda: None),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Stream),
        (cuda, "current_stream", lambda *_, **__: stream),
        (cuda, "default_stream", lambda *_, **__: stream),
        (cuda, "stream", lambda *_: contextlib.nullcontext()),
        (torch.Tensor, "record_stream", lambda self, _: None),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
        (torch.nn.Module, "cuda", lambda self, *_, **__: self),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    # Contexts such as torch.device("meta") look at their first use which functions they apply to: the original ones.
    with torch.device("cpu"):
        torch.empty(0)
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _TypeName(original_type(self))
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]


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


def _adapt_random() -> None:
    """Map CUDA's random state to the CPU generator (``torch.manual_seed`` itself calls CUDA's: not used here)."""
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
        module.manual_seed_all = lambda seed: None
    cuda.default_generators = _Generators()
    megatron_random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # Bound by name at import there.
    for module in (cuda, megatron_random):
        module._lazy_init = lambda: None
        module._lazy_call = lambda function, **_: function()
