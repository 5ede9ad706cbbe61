"""What asks a run to stop before its end: votes, echoes of a signal, and how the handlers come and go."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_hyperp.training.signals import SECONDS_OF_ONE_REQUEST, SIGNALS, StopRequests
from tests.run_distributed import run_distributed
from tests.toy import toy_config, write_corpus

ROOT = Path(__file__).parents[2]
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


def unlimited() -> StopRequests:
    return StopRequests(None, time.monotonic())


def test_nobody_asked() -> None:
    requests = unlimited()
    assert requests.ballot() == [0.0, 0.0, 0.0]
    assert requests.reason([0.0, 0.0, 0.0]) is None


def test_one_vote_of_many_ranks_stops_all() -> None:
    asked = unlimited()
    asked.note(signal.SIGUSR1, 0.0)
    votes = [sum(column) for column in zip(asked.ballot(), unlimited().ballot(), unlimited().ballot(), strict=True)]
    assert unlimited().reason(votes) == asked.reason(votes) == "SIGUSR1 (ranks that had got it: 1)"


def test_the_time_is_over_once_a_rank_says_so() -> None:
    late, early = StopRequests(1.5, time.monotonic() - 91), StopRequests(1.5, time.monotonic() - 89)
    assert (late.ballot(), early.ballot()) == ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    assert early.reason([0.0, 0.0, 1.0]) == "--exit-duration-in-mins 1.5 are over"


def test_an_echo_is_no_second_signal() -> None:
    """Torchrun passes SIGTERM on to workers that may have got it from Slurm already."""
    requests = unlimited()
    assert not requests.note(signal.SIGTERM, 100.0)
    assert not requests.note(signal.SIGTERM, 100.0 + SECONDS_OF_ONE_REQUEST)
    assert requests.note(signal.SIGTERM, 100.1 + SECONDS_OF_ONE_REQUEST)
    assert requests.note(signal.SIGUSR1, 100.1 + SECONDS_OF_ONE_REQUEST)


def test_handlers_are_there_only_while_listening() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    requests = unlimited()
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not any(requests.ballot()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.ballot() == [0.0, 1.0, 0.0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


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


def stop_asked_on_one_rank(folder: str) -> tuple[int, str | None]:
    """Train; rank 1 alone is asked to stop, in the third step."""
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.device import adapt_megatron, init_process_group
    from megatron_hyperp.training.loop import Trainer

    adapt_megatron()
    init_process_group(2)
    Path(folder, "run").mkdir(exist_ok=True)
    config = toy_config(f"{folder}/toy", Path(folder) / "run", num_layers=1).resolve(world_size=dist.get_world_size())
    trainer = Trainer(config, load_tokenizer(config.data.tokenizer_model or ""), None)
    steps = iter(range(100))

    def ballot() -> list[float]:
        if next(steps) == 2 and dist.get_rank() == 1:
            trainer.stop_requests.note(signal.SIGTERM, time.monotonic())
        return trainer.stop_requests.ballot()

    trainer.optimizer.ballot = ballot
    progress = trainer.train()
    trainer.close_reports()
    return progress.iteration, trainer.stopped


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    write_corpus(tmp_path, documents=200)
    assert run_distributed(stop_asked_on_one_rank, 2, str(tmp_path)) == [(3, "SIGTERM (ranks that had got it: 1)")] * 2
