"""Micro-batches of one data-parallel rank, in an order that depends on no layout and goes on where a run stopped."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import sys
import weakref
from collections.abc import Collection, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from megatron_hyperp.errors import LostRankError, UsageError
from megatron_hyperp.processes import bound_children

Batch = dict[str, torch.Tensor]
SampleDataset = Dataset[Batch]

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


class _RankBatchSampler(Sampler[list[int]]):
    """The sample numbers of one rank's micro-batches, as long as there are samples for all ranks."""

    def __init__(self, first: int, last: int, micro_batch_size: int, rank: int, size: int) -> None:
        self._starts = range(first + rank * micro_batch_size, last, size * micro_batch_size)
        self._length = max(0, last - first) // (size * micro_batch_size)
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts[: self._length]:
            yield list(range(start, start + self._micro_batch_size))


def batches(
    dataset: SampleDataset,
    *,
    micro_batch_size: int,
    consumed_samples: int = 0,
    num_batches: int | None = None,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one data-parallel rank, in dataset order.

    A global batch is the next samples of the dataset whatever the layout: micro-batch ``m`` of rank ``r`` begins at
    sample ``consumed_samples + (m * data_parallel_size + r) * micro_batch_size``. A run that resumes from its consumed
    samples sees the batches it would have seen; an evaluation that starts from 0 each time sees the same ones.

    Args:
        dataset: one of :func:`megatron_hyperp.data.datasets.build_datasets`.
        micro_batch_size: samples per batch.
        consumed_samples: samples that all ranks together have drawn before.
        num_batches: end after this many batches; otherwise go on as long as the dataset lasts.
        data_parallel_rank: this rank.
        data_parallel_size: number of data-parallel ranks.
        num_workers: loading processes; 0 loads in this process. The batches are the same.
        pin_memory: put the batches into page-locked memory, for a faster copy to a GPU.

    Returns:
        Dictionaries of ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), each
        ``[micro_batch_size, seq_length]``, and of ``attention_mask`` where the dataset makes one.

    Raises:
        UsageError: when the dataset has too few samples for ``num_batches``, or, from the iterator, for another batch.
        LostRankError: from the iterator, when a loading process died.
    """
    length = len(dataset)  # type: ignore[arg-type]
    stride = micro_batch_size * data_parallel_size
    last = length if num_batches is None else consumed_samples + num_batches * stride
    if last > length:
        raise _exhausted(length, consumed_samples, num_batches)
    loader = DataLoader(
        dataset,
        batch_sampler=_RankBatchSampler(
            consumed_samples, last, micro_batch_size, data_parallel_rank, data_parallel_size
        ),
        collate_fn=_collate,
        num_workers=num_workers,
        # Whatever this process was started by, or the Python version prefers: the kernel then ends them with this one.
        multiprocessing_context="fork" if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_process,
        # Without one of its own a loader draws a seed from the global generator, and every evaluation would change the
        # random numbers of training.
        generator=torch.Generator(),
    )
    return _until_exhausted(loader, length, consumed_samples, ends=num_batches is not None)


def filled_up(dataset: SampleDataset, *, planned: int, length: int) -> SampleDataset:
    """Return a dataset of at least ``length`` samples: those of ``dataset``, then its first ones again.

    The last batch of a run that has changed its batch size may exceed the samples that the run was planned with; a
    dataset built for more of them could have another order.

    Args:
        dataset: built for ``planned`` samples.
        planned: samples of the run.
        length: samples with which its last batch is full.

    Raises:
        UsageError: the dataset has fewer samples than planned.
    """
    held = len(dataset)  # type: ignore[arg-type]
    if held < planned:
        raise UsageError(
            f"the dataset holds {held:,} samples, fewer than the {planned:,} of the run; lower --train-iters or"
            " --train-tokens, or remove the folder of index caches, so that they are built again",
            same_on_all_ranks=True,
        )
    if length <= held:
        return dataset
    return ConcatDataset([dataset, Subset(dataset, [number % held for number in range(length - held)])])


def _prepare_process(_: int) -> None:
    """Set up a loading process, by its number.

    It ignores the signals that ask a rank to stop: launchers and terminals send them to a rank's children as well.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _ignore_lost_connections()


def _ignore_lost_connections() -> None:
    """Let no broken connection print a traceback in this loading process.

    A rank that ends while it takes a batch breaks the connection over which the thread of
    ``multiprocessing.resource_sharer`` hands out the batch's memory; that thread calls ``sys.excepthook``. Errors of a
    dataset take another way: they are sent to the rank.
    """
    hook = sys.excepthook

    def excepthook(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, OSError | EOFError):
            hook(kind, *rest)

    sys.excepthook = excepthook


# Loading processes of this one.
_processes: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _start(loader: DataLoader[Batch]) -> tuple[Iterator[Batch], set[BaseProcess]]:
    """Start a loader's processes, if it has any; they die with this process, however it dies.

    One that outlived its rank would keep open the rank's output and its connections, whose end tells the other ranks.
    """
    others = set(multiprocessing.active_children())
    with bound_children():
        iterator = iter(loader)
    started = set(multiprocessing.active_children()) - others
    _processes.update(started)
    return iterator, started


@atexit.register
def _kill_processes() -> None:
    """Kill the loading processes of iterators that still exist, because an exception's traceback refers to them.

    At exit multiprocessing, whose handler runs after this one, sends them SIGTERM, which they ignore, and waits.
    """
    if left := set(multiprocessing.active_children()) & set(_processes):
        # PyTorch's handler raises an exception when a loading process ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in left:
            process.kill()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that a loading process died; PyTorch may raise it anywhere in the main thread."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def lost_process(error: BaseException) -> LostRankError:
    """Return the error that ends a rank whose loading process died.

    Args:
        error: that reported it.
    """
    found = re.search(r"killed by signal: [A-Za-z ]+", str(error))
    reason = f" ({found[0]})" if found else ""
    return LostRankError(
        f"a data-loading process of this rank died{reason}, as when memory or shared memory (/dev/shm) is full; go on"
        " from the last checkpoint, with fewer --num-workers or more memory if it happens again"
    )


def _has_died(processes: Collection[BaseProcess]) -> bool:
    """Whether one of these processes has ended, or ends within a second."""
    try:
        return bool(processes and wait([process.sentinel for process in processes], timeout=1.0))
    except RuntimeError as error:
        return is_lost_process(error)


def _until_exhausted(loader: DataLoader[Batch], length: int, consumed_samples: int, *, ends: bool) -> Iterator[Batch]:
    batches, processes = _start(loader)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        # A batch that is in the queue already is fetched from the process that made it, over a socket.
        if is_lost_process(error) or _has_died(processes):
            raise lost_process(error) from error
        raise
    if not ends:
        raise _exhausted(length, consumed_samples, None)


def _exhausted(length: int, consumed_samples: int, num_batches: int | None) -> UsageError:
    wanted = "another batch is" if num_batches is None else f"{num_batches} batches are"
    return UsageError(
        f"the dataset holds {length} samples and {wanted} asked for after {consumed_samples} consumed ones; "
        "build it with more samples or take fewer steps",
        same_on_all_ranks=True,
    )


def _collate(samples: list[Batch]) -> Batch:
    """Stack samples; the keys that a blend adds are left out."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS if key in samples[0]}
