"""The one file that asks "CUDA or CPU?"; ``megatron_compat`` makes Megatron-Core run on the CPU with gloo."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GPUS, Gpu
from megatron_hyperp.launch import launch
from megatron_hyperp.megatron_compat import adapter, cpu
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
    cpu.remember_factories("meta")
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


def megatron_settings(virtual_stages: int = 1) -> dict[str, Any]:
    """TransformerConfig fields that depend on the device.

    Args:
        virtual_stages: pipeline chunks of a rank.
    """
    from megatron_hyperp.megatron_compat import schedules

    # An output is freed as soon as its send has started. Streams order that under CUDA; gloo may still be reading it.
    frees = has_cuda() and schedules.frees_pipeline_outputs(virtual_stages)
    return {"use_cpu_initialization": not has_cuda(), "deallocate_pipeline_outputs": frees}


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
    """Make Megatron-Core run on this process's device; call before building anything with it."""
    adapter.adapt(cuda=has_cuda())
