"""Ports that other programs and other jobs have, on real sockets of this machine."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

from megatron_hyperp import device, rendezvous
from megatron_hyperp.errors import UsageError
from megatron_hyperp.launch import Launch
from tests.run_distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = datetime.timedelta(seconds=20)
HERE = "127.0.0.1"


@pytest.fixture(autouse=True)
def seconds_to_answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short where a program does not answer."""
    if "taken" in request.node.name or "other" in request.node.name:
        monkeypatch.setattr(rendezvous, "SECONDS_TO_ANSWER", 1.0)


@contextmanager
def program(answer: bytes) -> Iterator[int]:
    """A program that is no store: it accepts connections, sends ``answer`` and keeps them open; yields its port."""
    with socket.create_server((HERE, 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    kept.append(connection)
                    connection.sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


@contextmanager
def foreign_store(job: str | None = None) -> Iterator[int]:
    """The store of another job, of ours if ``job`` is given; yields its port."""
    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    if job:
        store.set("megatron-hyperp/job", job)
    yield store.port
    del store


TAKEN: dict[str, Callable[[], object]] = {
    "silent": lambda: program(b""),
    "another protocol": lambda: program(b"SSH-2.0-OpenSSH_9.2\r\n" * 10),
    "a store": foreign_store,
    "the store of another job": lambda: foreign_store("runs/other of user 0 on 8 rank(s)"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_taken_port_is_refused_by_launchers(kind: str) -> None:
    with TAKEN[kind]() as port:  # type: ignore[attr-defined]
        for is_head in (None, True, False):
            with pytest.raises(UsageError, match=rf"^port {port} of {HERE} is taken, .* 'mine'; set PORT to a free"):
                rendezvous.check(HERE, port, "mine", is_head=is_head, wait=5)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_taken_port_is_refused_by_ranks(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with TAKEN[kind]() as port:  # type: ignore[attr-defined]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": HERE, "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UsageError, match=rf"^port {port} of {HERE} is taken by another .*; set MASTER_PORT to a"):
            device.init_process_group(0.2, run="runs/mine")
        assert not dist.is_initialized()


def test_a_free_port_is_the_heads() -> None:
    rendezvous.check(HERE, free_port(), "mine", is_head=None, wait=0)


def test_other_launchers_join_the_store_of_their_job() -> None:
    """Torchrun's own backend hosts it."""
    port = free_port()
    parameters = RendezvousParameters("c10d", f"{HERE}:{port}", "mine", 1, 1, is_host=True)
    kept = create_backend(parameters)
    for is_head in (None, False):
        rendezvous.check(HERE, port, "mine", is_head=is_head, wait=5)
        with pytest.raises(UsageError, match="is taken, and not by the job 'other'"):
            rendezvous.check(HERE, port, "other", is_head=is_head, wait=5)
    del kept


def test_connections_that_are_closing_do_not_take_a_port() -> None:
    """The side that closes first keeps the port in TIME_WAIT for a minute, as after a job that has just ended."""
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection((HERE, port))
        connection, _ = server.accept()
        connection.close()
        client.close()
    assert rendezvous.is_free(port)


def test_a_head_that_does_not_start_or_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=rf"^nothing listens at port [0-9]+ of {HERE} after 0.1 s \(Connection ref"):
        rendezvous.check(HERE, free_port(), "mine", is_head=False, wait=0.1)
    with pytest.raises(UsageError, match=r"^'no such\.invalid' is not the name or address of a machine"):
        rendezvous.check("no such.invalid", 29500, "mine", is_head=None, wait=0)


def in_threads(ranks: list[int], runs: list[str]) -> list[str]:
    """Let ranks of a job of two meet, until one is refused; return what each was told, an empty string for success."""
    port, said = free_port(), ["hangs"] * len(ranks)
    # The server ends with the last reference to it, while another rank may still wait for its answer.
    stores: list[TCPStore] = []

    def join(index: int) -> None:
        try:
            store = rendezvous.meet(Launch(ranks[index], 2, 0, HERE, port), runs[index], TIMEOUT)
            stores.append(store)
            store.set(f"met {index}", "")
            store.wait([f"met {other}" for other in range(len(ranks))], TIMEOUT)
            said[index] = ""
        except (UsageError, RuntimeError) as error:
            said[index] = str(error)

    threads = [threading.Thread(target=join, args=(index,), daemon=True) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while "hangs" in said and not set(said) - {"", "hangs"} and time.monotonic() < deadline:
        time.sleep(0.05)
    return said


def test_ranks_of_one_job_meet() -> None:
    assert in_threads([1, 0], ["runs/mine", "runs/mine"]) == ["", ""]


def test_ranks_of_another_job_are_refused() -> None:
    user = os.getuid()
    with foreign_store(f"runs/theirs of user {user} on 2 rank(s)") as port, pytest.raises(UsageError) as refused:
        rendezvous.meet(Launch(1, 2, 0, HERE, port), "runs/mine", TIMEOUT)
    assert str(refused.value) == (
        f"port {port} of {HERE} is taken by another job, runs/theirs of user {user} on 2 rank(s), and this is runs/mine"
        f" of user {user} on 2 rank(s); set MASTER_PORT to a free one, the same on all ranks"
    )


def test_two_processes_of_one_rank_are_refused() -> None:
    said = in_threads([0, 1, 1], ["runs/mine"] * 3)
    assert sum("two processes have RANK 1 at port" in line for line in said) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["h", "many", "j"], "PORT is 'many'; it must be a whole number from 1 to 65535"),
        (["h", "65536", "j"], "PORT is '65536'; it must be a whole number from 1 to 65535"),
        (["--is-head", "yes", "h", "1", "j"], "IS_HEAD is 'yes'; set it to 1 on the node HEAD and to 0 on the others"),
    ],
)
def test_bad_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        rendezvous.main(words)
    assert str(refused.value) == message
