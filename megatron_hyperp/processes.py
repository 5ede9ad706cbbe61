"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
# Found before any fork: a child of a process with threads should load nothing.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


def die_with_parent(parent: int, last_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent dies, SIGKILL included; a child calls this first.

    Outside Linux this only ends a child whose parent is dead already.

    Args:
        parent: its process ID, as the parent itself knows it.
        last_signal: what this process gets then.
    """
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, int(last_signal), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve_parent_alone(parent: int, ignored: Iterable[signal.Signals]) -> None:
    """Die with the parent, and of no signal that is meant for it.

    Args:
        parent: its process ID.
        ignored: signals that a scheduler sends to all processes of a job.
    """
    die_with_parent(parent)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


# Whether processes that are forked now die with their parent, and the process ID of that parent.
_bound, _forking = False, 0


@contextmanager
def bound_children() -> Iterator[None]:
    """Have processes that are forked in the block, and all that those fork, die with their parents.

    A writer of a checkpoint that waits for its dead rank would wait for ever, and hold the rank's output and memory.
    The thread that forks must live as long as its process: it is that thread's death which the kernel waits for.
    """
    global _bound
    before, _bound = _bound, True
    try:
        yield
    finally:
        _bound = before


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _after_fork() -> None:
    if _bound:
        die_with_parent(_forking)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
