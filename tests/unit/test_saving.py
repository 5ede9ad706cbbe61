"""What a save leaves to others: the process that its writers report to."""

from __future__ import annotations

import subprocess
import sys
from queue import Empty, Queue

import pytest

from megatron_hyperp.training.saving import _Packed
from tests.functional.launch import ROOT


def test_values_are_bytes_to_the_process_between() -> None:
    held: Queue[bytes] = Queue()
    queue = _Packed(held)
    queue.put({"a": [1, 2]})
    assert isinstance(held.queue[0], bytes)
    assert queue.get_nowait() == {"a": [1, 2]}
    with pytest.raises(Empty):
        queue.get_nowait()


def test_the_entry_point_imports_no_torch_until_it_trains() -> None:
    """A new process imports it again, before it does what it is for."""
    code = "import sys; from examples import pretrain_gpt; pretrain_gpt.parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
