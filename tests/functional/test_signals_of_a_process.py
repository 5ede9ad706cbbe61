"""Signals to one process: while its main thread runs no Python, to its children, and with duplicates of its socket."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from tests.functional.launch import ROOT
from tests.unit.test_signals import unlimited

# Gets two signals while its main thread waits forever.
STUCK = (
    "import ctypes, os, signal, threading, time\n"
    "from megatron_hyperp.training import signals\n"
    "signals.SECONDS_OF_ONE_REQUEST = 0.2\n"
    "def send():\n"
    "    for _ in range(2):\n"
    "        time.sleep(0.5)\n"
    "        os.kill(os.getpid(), signal.SIGTERM)\n"
    "with signals.StopRequests(None, 0.0).listening():\n"
    "    threading.Thread(target=send).start()\n"
    "    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
    "    library.pthread_mutex_lock(mutex)\n"
    "    library.pthread_mutex_lock(mutex)\n"
)


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_duplicates_of_the_socket_do_not_keep_the_listener_waiting() -> None:
    """As forked data-loading processes hold them."""
    script = (
        "import faulthandler, os, signal\n"
        "from megatron_hyperp.training import signals\n"
        "faulthandler.dump_traceback_later(5, exit=True)\n"
        "with signals.StopRequests(None, 0.0).listening():\n"
        "    descriptor = signal.set_wakeup_fd(-1)\n"
        "    os.dup(descriptor)\n"
        "    signal.set_wakeup_fd(descriptor)\n"
    )
    process = python(script)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_signal_to_a_forked_child_is_no_request_to_its_parent() -> None:
    requests, context = unlimited(), multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=lambda: (started.set(), time.sleep(60)), daemon=True)
    with requests.listening():
        child.start()
        assert started.wait(10)
        os.kill(child.pid or 0, signal.SIGUSR1)
        child.join(0.5)
        assert requests.ballot() == [0.0, 0.0, 0.0]
    child.kill()


def test_a_second_interrupt_ends_a_main_thread_that_runs_no_python() -> None:
    script = STUCK.replace("SIGTERM", "SIGINT")
    process = python(script)
    assert (process.returncode, process.stderr) == (128 + signal.SIGINT, "a second signal, SIGINT: ends at once\n")


def test_a_second_signal_ends_a_main_thread_that_runs_no_python() -> None:
    """As in a collective that never ends: the handler itself would have to wait for it."""
    process = python(STUCK)
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stderr == "a second signal, SIGTERM: ends at once\n"
