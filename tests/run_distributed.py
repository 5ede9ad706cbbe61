"""The one helper that starts ranks: gloo processes on this machine, one thread each.

Ranks are forked from a process that has imported the trainer once (:func:`warm_context`), since an import of
Megatron-Core takes five to ten seconds and the tests start hundreds of ranks. Ranks live for one call: one that dies or
hangs fails the test that started it, and no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp

# Below the ports that the system gives to outgoing connections.
_PORTS = range(10000, 32768)
ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a TCP port that is free, and that no test on this machine is given again before all others were.

    Ports are drawn long before ranks listen on them: that they are free when drawn is not enough.
    """
    with (Path(tempfile.gettempdir()) / f"megatron_hyperp_tests_{os.getuid()}.port").open("a+") as last:
        fcntl.flock(last, fcntl.LOCK_EX)
        last.seek(0)
        port = int(last.read() or random.choice(_PORTS))
        while True:
            port = _PORTS[(_PORTS.index(port) + 1) % len(_PORTS)]
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                break
        last.truncate(0)
        last.write(str(port))
    return port


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a rank on one node, and that it has one thread."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in (place | {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}).items()}


def warm_context() -> Any:
    """Return the multiprocessing context whose processes are forked from one that has imported the trainer."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preload"])
    return found


# Servers that have imported something else than the trainer alone, by what they have imported.
_servers: dict[str, forkserver.ForkServer] = {}


@contextlib.contextmanager
def _forking_from(preload: str) -> Iterator[None]:
    """Let processes of :func:`warm_context` be forked from a server of their own, which has imported ``preload``."""
    if preload not in _servers:
        _servers[preload] = forkserver.ForkServer()
        _servers[preload].set_forkserver_preload([preload])
    with mock.patch.object(forkserver, "connect_to_new_process", _servers[preload].connect_to_new_process):
        yield


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, preload: str | None = None, seconds: float = 300
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` new processes and return their results, by rank.

    The environment is torchrun's. The function joins process groups itself; it must be importable, and what it
    returns must be plain values or tensors.

    Args:
        function: called by every rank.
        world_size: number of ranks.
        args: its arguments.
        preload: module that the ranks have imported instead of ``tests.preload``; it replaces a library before
            Megatron-Core looks for it. Ranks that use CUDA are spawned and have imported nothing, since a process
            forked from one that holds a CUDA context cannot use it.
        seconds: after which ranks that have not ended are killed.

    Raises:
        AssertionError: a rank failed, died or did not end; the message has the tracebacks.
    """
    method = "spawn" if torch.cuda.is_available() else warm_context().get_start_method()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        call = (function, world_size, free_port(), folder, args, dict(os.environ))
        with _forking_from(preload) if preload is not None else contextlib.nullcontext():
            context = mp.start_processes(_rank, call, nprocs=world_size, join=False, start_method=method)
        try:
            # The trainer's ranks take SIGTERM for a request to stop: two seconds after it they are killed.
            while not context.join(deadline - time.monotonic(), grace_period=2.0):
                alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                assert time.monotonic() < deadline, f"ranks {alive} did not end within {seconds:.0f} s"
        except mp.ProcessExitedException as error:
            failures = [path.read_text() for path in sorted(Path(folder).glob("*.failed"))]
            raise AssertionError("\n".join([str(error), *failures])) from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    folder: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    # A forked rank has the environment that the first test of the session had.
    os.environ.clear()
    os.environ |= environment | torchrun_environment(rank, world_size, port)
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except BaseException:
        (Path(folder) / f"{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        # Not an exception: the other ranks may wait for this one for ever, and join() ends them.
        os._exit(1)
    torch.save(result, Path(folder) / f"{rank}.result")
    if torch.distributed.is_initialized():
        # A rank that leaves while another still talks to it makes gloo abort that one.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
