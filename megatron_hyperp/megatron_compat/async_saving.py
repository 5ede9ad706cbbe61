"""Megatron-Core's queue of asynchronous saves, and the process through which its writers report."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_hyperp.processes import serve_parent_alone


def save_queue() -> Any:
    """Return a queue that forks a writer for each save.

    On CPU the fork is the copy of what is saved. A persistent writer would share tensors that are on the CPU, and write
    what the training has made of them meanwhile.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    return AsyncCallsQueue(persistent=False)


@functools.cache
def start_reports(ignored: tuple[signal.Signals, ...]) -> None:
    """Start the process through which Megatron-Core's writers report, in place of its own.

    A signal to all processes of a job, as Slurm sends it, would end that one before the checkpoint that it asks for;
    and the death of its rank would not, so that it kept the rank's output open.

    Args:
        ignored: signals that a scheduler sends to all processes of a job.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(serve_parent_alone, (os.getpid(), ignored))
    # The function that starts Megatron-Core's own was renamed in 0.17; what it looks for was not.
    assert hasattr(filesystem_async, "_results_queue")
    filesystem_async._results_queue = _Packed(manager.Queue())


class _Packed:
    """A queue whose values are pickled by those that use it, so that the process that holds it imports no torch.

    Args:
        queue: of a manager.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, value: Any) -> None:
        """Append a value."""
        self._queue.put(pickle.dumps(value))

    def get_nowait(self) -> Any:
        """Return the next value; raise ``queue.Empty`` if there is none."""
        # Of this rank's own writers.
        return pickle.loads(self._queue.get_nowait())  # nosec B301
