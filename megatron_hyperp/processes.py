"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable

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
