"""Children that do not outlive their parent."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

# Two processes are forked in the block, one by the other, and two after it.
FORKS = """
import os, time
from megatron_hyperp.processes import bound_children

def child(name):
    if not os.fork():
        os.fork()
        # In one piece, whatever others write meanwhile.
        os.write(1, f"{name} {os.getpid()}\\n".encode())
        time.sleep(60)

with bound_children():
    child("bound")
child("free")
time.sleep(60)
"""


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_what_is_forked_in_the_block_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids: dict[str, list[int]] = {"bound": [], "free": []}
    for name, pid in (parent.stdout.readline().split() for _ in range(4)):
        pids[name].append(int(pid))
    try:
        assert len(alive(pids["bound"])) == len(alive(pids["free"])) == 2
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while alive(pids["bound"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(pids["bound"])
        assert len(alive(pids["free"])) == 2
    finally:
        for pid in [parent.pid, *alive(pids["free"]), *alive(pids["bound"])]:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        parent.stdout.close()
