"""What the benchmarks measure with: ranks on this machine, clocks, counted collectives."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Calls before the first that is timed: memory is allocated in them, and on a GPU kernels are compiled and chosen.
WARM_UPS = 3
# On CPU, whatever the machine has. What is freed stays with the process, as it does under CUDA: else a step would pay
# for fresh pages, at random.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def run_ranks(function: Callable[..., None], ranks: int, port: str, *args: Any) -> None:
    """Call ``function(*args)`` on that many gloo ranks, processes of this machine with one thread each."""
    os.environ.update(SETTINGS)
    mp.spawn(_rank, (function, ranks, port, args), nprocs=ranks)


def _rank(rank: int, function: Callable[..., None], ranks: int, port: str, args: Sequence[Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(*args)
    dist.barrier()
    dist.destroy_process_group()


def seconds(function: Callable[[], object]) -> float:
    """Time a call that all ranks start together."""
    dist.barrier()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def slowest(method: Callable[[], Sequence[float]]) -> Callable[[], list[float]]:
    """Return the method with each of its numbers the largest over the ranks."""
    return lambda: largest(method()).tolist()


def largest(values: Sequence[float]) -> torch.Tensor:
    """Return each value's largest over the ranks, in float64."""
    result = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


class Clock:
    """Adds up the seconds that named parts of a step take."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed as a part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
            return result

        return timed

    def take(self, part: str) -> float:
        """Return a part's seconds since they were last taken."""
        return self._seconds.pop(part, 0.0)


@dataclass(slots=True)
class Traffic:
    """Collectives in which this rank met others, and the bytes that it sent by the ring algorithm."""

    collectives: int = 0
    sent: float = 0.0


# By collective, which argument is the whole buffer, and how often (p-1)/p of it is sent.
COLLECTIVES = {
    "all_reduce": (0, 2),
    "all_gather": (0, 1),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "all_to_all_single": (1, 1),
}


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what is called through ``torch.distributed`` within, with the group given by keyword."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, _counting(name, getattr(dist, name), traffic)))
        yield traffic


def _counting(name: str, function: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    whole, times = COLLECTIVES[name]

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_world_size(kwargs.get("group"))
        if ranks > 1:
            buffers = args[whole] if isinstance(args[whole], list) else [args[whole]]
            size = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
            traffic.collectives += 1
            traffic.sent += times * size * (ranks - 1) / ranks
        return function(*args, **kwargs)

    return counting
