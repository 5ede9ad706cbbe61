"""examples/torchrun/multi_node.sh on two nodes: network namespaces with an address each, and a cable between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.logging import read_events
from tests.functional.launch import assert_same_run, launched, train, wait_for_rows, write_config
from tests.toy import toy_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2's ip"
    ),
]
NODES = {"hyperp0": "10.77.0.1", "hyperp1": "10.77.0.2"}
ITERATIONS = 900
# Seconds that a collective waits: shorter than the cut, longer than a step on busy cores.
TIMEOUT = 15


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """Two namespaces; ``cable`` is the name of the interface in each."""
    first, second = NODES
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for node, address in NODES.items():
            ip("-n", node, "address", "add", f"{address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", node, "link", "set", interface, "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], check=False, capture_output=True)


@pytest.fixture(scope="module")
def config(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    toy = toy_config(corpus, folder, num_layers=1, train_iters=ITERATIONS, save_interval=50, keep=2)
    return write_config(toy, folder / "toy.yaml")


@pytest.fixture(scope="module")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    train(config, "--run-dir", folder, ranks=2)
    return folder


@contextmanager
def node(index: int, config: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the script on one node; see that nothing is left there at the end."""
    name, address = list(NODES.items())[index]
    script = [
        "bash",
        "examples/torchrun/multi_node.sh",
        str(config),
        "--distributed-timeout-minutes",
        f"{TIMEOUT / 60}",
    ]
    settings: dict[str, Any] = {"NNODES": 2, "HEAD": NODES["hyperp0"], "IS_HEAD": 1 - index, "NODE_ADDR": address}
    settings |= {"NPROC_PER_NODE": 1, "LAYOUT": "none", "RUN_DIR": run, "GLOO_SOCKET_IFNAME": "cable"}
    try:
        with launched(["ip", "netns", "exec", name, *script], **settings) as process:
            yield process
    finally:
        kill_all(name)


def kill_all(name: str) -> None:
    """Kill every process of a node at once, as a power cut does."""
    listed = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout.split()
    for pid in listed:
        # Some die with their parents.
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def assert_as_if_nothing_had_happened(run: Path, straight: Path) -> None:
    assert "resumed" in [event["kind"] for event in read_events(run)]
    assert_same_run(run, straight, ITERATIONS)


@pytest.mark.usefixtures("cable")
def test_a_node_that_is_cut_off_comes_back(config: Path, straight: Path, tmp_path: Path) -> None:
    """Longer than a collective waits: ranks give up on both sides, and start again when the cable is in."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(index, config, tmp_path)) for index in (0, 1)]
        wait_for_rows(tmp_path, 170, nodes[0])
        ip("-n", "hyperp1", "link", "set", "cable", "down")
        time.sleep(2 * TIMEOUT)
        ip("-n", "hyperp1", "link", "set", "cable", "up")
        ends = [process.communicate(timeout=300)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], ends
    for end in ends:
        assert f"another rank died, or hung for --distributed-timeout-minutes (Timed out waiting {TIMEOUT}000ms" in end
    assert_as_if_nothing_had_happened(tmp_path, straight)


@pytest.mark.usefixtures("cable")
def test_a_node_that_lost_its_power_joins_again(config: Path, straight: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        head = stack.enter_context(node(0, config, tmp_path))
        with node(1, config, tmp_path):
            wait_for_rows(tmp_path, 170, head)
            kill_all("hyperp1")
        again = stack.enter_context(node(1, config, tmp_path))
        ends = [process.communicate(timeout=300)[1] for process in (head, again)]
    assert [head.returncode, again.returncode] == [0, 0], ends
    assert_as_if_nothing_had_happened(tmp_path, straight)
