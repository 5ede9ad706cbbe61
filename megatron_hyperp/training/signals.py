"""Stopping before the end: what asks for it, and how all ranks come to stop after the same step.

Each rank notes what it was asked for and votes in every step; a signal that only some ranks got, or got late, stops all
of them after the step in whose votes it was first counted. Votes are three numbers more in the all-reduce of the
gradient norm, which every step waits for anyway; benchmarks/signals_cost measures what that costs.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_hyperp.errors import leave_at_once

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Those of which a second one ends the process at once; the first SIGINT raises KeyboardInterrupt.
_WATCHED = (*SIGNALS, signal.SIGINT)
# A launcher that is signalled beside its workers passes the signal on to them: they get one request twice.
SECONDS_OF_ONE_REQUEST = 3.0


class StopRequests:
    """What this rank was asked for, as votes.

    Args:
        minutes: that the run may last; None for as long as it takes.
        started: when it began, by ``time.monotonic()``.
    """

    def __init__(self, minutes: float | None, started: float) -> None:
        self._minutes = minutes
        self._started = started
        self._noted: dict[int, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGUSR1 instead of dying; only the main thread may call this.

        A signal later than ``SECONDS_OF_ONE_REQUEST`` after the first ends this process at once, with exit code
        128 + its number, even while the main thread waits in a collective; so does a second SIGINT.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        _sockets.update((reader, writer))
        # Python runs a handler only between two of its own instructions, and a collective may never end. What it writes
        # into this socket it writes at once.
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}
        listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            # Closing alone would not end the listener: a child process may hold a duplicate of the descriptor.
            writer.shutdown(socket.SHUT_WR)
            listener.join()
            for each in (reader, writer):
                each.close()
                _sockets.discard(each)

    def _listen(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                # Other signals that have a handler are written to the socket, too.
                if number in _WATCHED and self.note(number, time.monotonic()):
                    print(f"a second signal, {signal.Signals(number).name}: ends at once", file=sys.stderr, flush=True)
                    leave_at_once(128 + number)

    def note(self, number: int, now: float) -> bool:
        """Take in a signal; return whether it is a second request, and not the first one's echo."""
        second = bool(self._noted) and now - min(self._noted.values()) > SECONDS_OF_ONE_REQUEST
        self._noted.setdefault(number, now)
        return second

    def ballot(self) -> list[float]:
        """Return this rank's votes, 0 or 1: for SIGTERM, for SIGUSR1, and that the time is over."""
        late = self._minutes is not None and time.monotonic() - self._started >= 60 * self._minutes
        return [*(float(number in self._noted) for number in SIGNALS), float(late)]

    def reason(self, votes: Sequence[float]) -> str | None:
        """Say why to stop; None: go on.

        Args:
            votes: the ballots of all ranks, summed.
        """
        *signals, late = votes
        for number, ranks in zip(SIGNALS, signals, strict=True):
            if ranks:
                return f"{number.name} (ranks that had got it: {ranks:.0f})"
        return f"--exit-duration-in-mins {self._minutes:g} are over" if late else None


def _nothing(*_: Any) -> None: ...


# Of this process's listeners.
_sockets: set[socket.socket] = set()


def _close_inherited() -> None:
    """In a forked child: a signal to the child must not count as one to its parent."""
    if _sockets:
        signal.set_wakeup_fd(-1)
    for each in _sockets:
        each.close()
    _sockets.clear()


os.register_at_fork(after_in_child=_close_inherited)
