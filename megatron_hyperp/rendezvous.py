"""Where the processes of a job meet: a TCP port with a store, which must be this job's and no other program's.

``python -m megatron_hyperp.rendezvous HEAD PORT JOB_ID`` looks at the port before torchrun does. Torchrun would wait
forever for a program that accepts connections and is no store, and would use the store of another job as its own.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.launch import Launch, number

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Seconds that a program at the port has to prove that it is a store, and then that it is this job's store.
SECONDS_TO_ANSWER = 15.0
# Under which our ranks tell each other their job.
_JOB = "megatron-hyperp/job"


def is_free(port: int) -> bool:
    """Whether a program of this machine could listen on a TCP port, on all interfaces as a store does."""
    dual = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if dual else (socket.AF_INET, "")
    try:
        # Connections that are closing do not count: it sets SO_REUSEADDR, as stores do.
        socket.create_server((host, port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def is_local(host: str) -> bool:
    """Whether a name or address is one of this machine's own. Raises: UsageError: the name has no address."""
    for family, kind, protocol, _, address in _addresses(host, 0):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"{host!r} is not the name or address of a machine ({error}); check its spelling") from error


def connect(host: str, port: int, *, wait: float) -> TCPStore | None:
    """Connect to the store at a port.

    Args:
        host: name or address of its machine.
        port: TCP port.
        wait: seconds for something to listen there.

    Returns:
        The store, or None if what listens there does not answer like one.

    Raises:
        UsageError: nothing listens there in time, or the machine does not exist.
    """
    _wait_for_listener(host, port, wait)
    from torch.distributed import TCPStore

    found: list[TCPStore] = []

    def join() -> None:
        timeout = datetime.timedelta(seconds=SECONDS_TO_ANSWER)
        try:
            found.append(TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
        except (RuntimeError, ValueError):
            return

    # TCPStore's own timeout ends no wait for a program that accepts a connection and then says nothing.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return found[0] if found else None


def _wait_for_listener(host: str, port: int, wait: float) -> None:
    deadline = time.monotonic() + wait
    _addresses(host, port)
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"nothing listens at port {port} of {host} after {wait:g} s ({error.strerror or error}); see"
                    " whether the first node has started, and whether its name and port are these"
                ) from error
            time.sleep(0.5)
        else:
            return


def meet(launch: Launch, run: str, timeout: datetime.timedelta) -> TCPStore:
    """Return the store of this job, with all of its ranks: rank 0 hosts it, the others join.

    Args:
        launch: this rank's place.
        run: what all ranks of the job have in common, and other jobs do not.
        timeout: of the store, and for all ranks to come.

    Raises:
        UsageError: the port is another program's, or two processes have the same rank.
        RuntimeError: a rank does not come in time.
    """
    from torch.distributed import TCPStore

    where = f"port {launch.port} of {launch.address}"
    advice = "set MASTER_PORT to a free one, the same on all ranks"
    job = f"{run} of user {os.getuid()} on {launch.world_size} rank(s)"
    if launch.rank == 0:
        if not is_free(launch.port):
            raise UsageError(f"{where} is taken by another program; {advice}")
        store = TCPStore(launch.address, launch.port, is_master=True, timeout=timeout, wait_for_workers=False)
        there = store.compare_set(_JOB, "", job)
    else:
        found = connect(launch.address, launch.port, wait=timeout.total_seconds())
        if found is None or not _has(found, _JOB):
            raise UsageError(f"{where} is taken by another program than this job's rank 0; {advice}")
        store, there = found, found.get(_JOB)
        store.set_timeout(timeout)
    if there.decode() != job:
        raise UsageError(f"{where} is taken by another job, {there.decode()}, and this is {job}; {advice}")
    if store.add(f"{_JOB}/rank {launch.rank}", 1) > 1:
        raise UsageError(f"two processes have RANK {launch.rank} at {where}; give each process its own, from 0 on")
    store.wait([f"{_JOB}/rank {rank}" for rank in range(launch.world_size)], timeout)
    return store


def _has(store: TCPStore, key: str) -> bool:
    """Whether a store has a key, or gets it in time."""
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def check(head: str, port: int, job: str, *, is_head: bool | None, wait: float) -> None:
    """See that torchrun's rendezvous of this job can meet at a port.

    Args:
        head: name or address of the node that hosts the store.
        port: TCP port.
        job: torchrun's ``--rdzv-id``.
        is_head: whether this is that node; None: if ``head`` is one of its addresses.
        wait: seconds for the head to start.

    Raises:
        UsageError: the port is another program's or job's, or nothing listens there in time.
    """
    local = is_local(head) if is_head is None else is_head
    if local and is_free(port):
        return
    where = f"port {port} of {head}"
    if not is_head:
        # Several launchers of a job may run on one machine: the first one hosts the store.
        store = connect(head, port, wait=0 if local else wait)
        # Torchrun's c10d backend writes this key as soon as it has a store.
        if store is not None and _has(store, f"torch.rendezvous.{job}"):
            return
    raise UsageError(f"{where} is taken, and not by the job {job!r}; set PORT to a free one, the same on all nodes")


def main(argv: list[str]) -> None:
    """Check the port of ``examples/torchrun/multi_node.sh``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head")
    parser.add_argument("port")
    parser.add_argument("job")
    parser.add_argument("--is-head", help="1 or 0 [whether HEAD is an address of this machine]")
    parser.add_argument("--wait", default="0", help="seconds for HEAD to start [0]")
    options = parser.parse_args(argv)
    port, wait = number("PORT", options.port, 1, 65535), number("JOIN_TIMEOUT", options.wait, 0, 10**9)
    if options.is_head not in (None, "0", "1"):
        raise UsageError(f"IS_HEAD is {options.is_head!r}; set it to 1 on the node HEAD and to 0 on the others")
    # Errors are one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    is_head = None if options.is_head is None else options.is_head == "1"
    check(options.head, port, options.job, is_head=is_head, wait=wait)


if __name__ == "__main__":
    run_command(main)
