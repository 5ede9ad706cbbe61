"""What a save waits for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import device
from megatron_hyperp.training.checkpoint_folders import TRACKER
from tests.toy import one_rank, rows_of_training, toy_config, write_corpus


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
