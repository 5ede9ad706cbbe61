"""What a save leaves to others, what it refuses, and what it waits for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.megatron_compat.async_saving import _Packed
from megatron_hyperp.training.checkpointing import TRACKER
from megatron_hyperp.training.saving import _check_finite
from tests.functional.launch import ROOT
from tests.toy import one_rank, rows_of_training, toy_config, write_corpus


@dataclass
class Shard:
    key: str
    data: torch.Tensor


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


def test_each_of_several_shards_of_one_name_must_be_finite() -> None:
    """Halves of a fused weight and experts have one name on a rank."""
    sound, bad = torch.zeros(2), torch.tensor([1.0, float("nan")])
    with one_rank():
        _check_finite({"model": [Shard("w", sound), Shard("w", sound)], "steps": 3}, 5)
        with pytest.raises(UsageError, match="w of rank 0 is not finite after iteration 5, so nothing is saved"):
            _check_finite({"model": [Shard("w", bad), Shard("w", sound)]}, 5)


def test_all_is_on_the_disk_before_the_one_before_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flushed, renamed and deleted, in which order: a disk that loses power keeps no other promise."""
    device.adapt_megatron()
    order, root = tmp_path / "order", tmp_path / "checkpoints"
    _note_calls(order, monkeypatch)
    config = toy_config(write_corpus(tmp_path), tmp_path, num_layers=1, train_iters=2, save_interval=1, keep=1)
    config.checkpoint.save = str(root)
    with one_rank():
        rows_of_training(config)
    done = [line.split(" ") for line in order.read_text().splitlines()]
    partial, newest, oldest = (str(root / name) for name in ("partial_iter_0000002", "iter_0000002", "iter_0000001"))
    named = done.index(["replace", partial, newest])
    flushed = {Path(words[1]).name for words in done[:named] if words[0] == "fsync" and words[1].startswith(partial)}
    files = {path.name for path in Path(newest).iterdir()} - {"checksums.json", "config.yaml"}
    assert files <= flushed
    assert any(name.startswith("checksums.json") for name in flushed)
    assert any(name.startswith("config.yaml") for name in flushed)
    # The names in the folder; then its own; then what the tracker says; then what was before it may go.
    assert done[:named][-1] == ["fsync", partial]
    tracked = done.index(["replace", str(root / TRACKER)], named)
    assert ["fsync", str(root)] in done[named:tracked]
    assert done[tracked - 1][1].startswith(str(root / TRACKER))
    deleted = done.index(["rmtree", oldest])
    assert ["fsync", str(root)] in done[tracked:deleted]


def _note_calls(order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a line for each flush, rename and deletion, of processes that are forked from this one as well."""
    descriptor = os.open(order, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def noted(module: Any, name: str, words: Any) -> None:
        original = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            os.write(descriptor, f"{name} {words(*given)}\n".encode())
            return original(*given, **named)

        monkeypatch.setattr(module, name, call)

    noted(os, "fsync", lambda file: os.readlink(f"/proc/self/fd/{file}"))
    # Of the tracker's temporary file the last name alone.
    noted(os, "replace", lambda old, new: str(new) if Path(new).name == TRACKER else f"{old} {new}")
    noted(shutil, "rmtree", lambda folder: folder)
