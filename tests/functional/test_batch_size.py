"""A run that resumes with another global batch size: the same tokens, the same point of the schedule, or a refusal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.data.datasets import build_datasets
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import loop
from megatron_hyperp.training.logging import read_metrics
from megatron_hyperp.training.pretrain import pretrain
from tests.toy import toy_config, write_corpus

BATCH, ITERATIONS, SEQ_LENGTH = 8, 12, 16
SAMPLES = BATCH * ITERATIONS
SHAPE = {
    **{"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "seq_length": SEQ_LENGTH, "lr": None},
    **{"micro_batch_size": 2, "global_batch_size": BATCH, "train_iters": ITERATIONS, "lr_warmup_iters": 2},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of a few more samples than the run draws in one epoch, so that their order depends on their number."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=20)


@pytest.fixture(scope="module")
def straight(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with one batch size, with a checkpoint at its half."""
    folder = tmp_path_factory.mktemp("straight")
    config = configured(prefix, folder, save=str(folder / "checkpoints"), save_interval=6)
    assert pretrain(config, world_size=1) == 0
    return folder


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def configured(prefix: str, folder: Path, **changes: Any) -> Config:
    device.adapt_megatron()
    return toy_config(prefix, folder, **{**SHAPE, **changes})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if "loss" in row]


def half(straight: Path) -> str:
    return str(straight / "checkpoints" / "iter_0000006")


@pytest.mark.parametrize(("batch", "iterations"), [(16, 3), (4, 12), (6, 8), (10, 5)])
def test_another_batch_ends_after_the_same_tokens(
    prefix: str,
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    iterations: int,
) -> None:
    asked: list[int] = []

    def build(**options: Any) -> Any:
        asked.append(options["num_samples"][0])
        return build_datasets(**options)

    monkeypatch.setattr(loop, "build_datasets", build)
    config = configured(prefix, tmp_path, load=half(straight), global_batch_size=batch)
    assert pretrain(config, world_size=1) == 0
    output, found, before = capsys.readouterr().out, rows(tmp_path), rows(straight)
    # On which the order of the data depends.
    assert asked == [SAMPLES]
    extra = 48 + iterations * batch - SAMPLES
    assert [row["iteration"] for row in found] == list(range(7, 7 + iterations))
    assert found[-1]["tokens"] == before[-1]["tokens"] + extra * SEQ_LENGTH
    line = f"48 of 96 sequences done; {iterations} iterations of {batch} to go, up to iteration {6 + iterations}"
    assert line + (f", the last of which exceeds the end by {extra}" if extra else "") + "\n" in output
    assert f"iteration {6 + iterations}/{6 + iterations} (100%)" in output
    # The law's rate for the batch, at the same point of the schedule: linear to a tenth of the peak after the warm-up.
    factor, peak = math.sqrt(batch / BATCH), before[2]["lr"]
    assert f"the transfer law has a factor of {factor:.4g}" in output
    for row in found:
        done = (row["tokens"] / SEQ_LENGTH - batch - 16) / (SAMPLES - 16)
        assert row["lr"] == pytest.approx(factor * peak * (1 - 0.9 * done))


def test_the_checkpoints_schedule_can_be_kept(
    prefix: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run that has changed its batch size resumes as any other, with the same command, bit for bit."""
    changes = {"global_batch_size": 16, "use_checkpoint_opt_param_scheduler": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain(configured(prefix, whole, **changes, load=half(straight)), world_size=1) == 0
    assert rows(whole)[0]["lr"] == rows(straight)[6]["lr"]
    save = str(parts / "checkpoints")
    first = configured(prefix, parts, **changes, load=half(straight), save=save, exit_interval=8)
    assert pretrain(first, world_size=1) == 0
    capsys.readouterr()
    assert pretrain(configured(prefix, parts, **changes, load=save, save=save), world_size=1) == 0
    output = capsys.readouterr().out
    assert "80 of 96 sequences done; 1 iterations of 16 to go, up to iteration 9\n" in output
    assert "note: " not in output
    for row, other in zip(rows(parts), rows(whole), strict=True):
        assert {**row, "tokens_per_s": 0.0} == {**other, "tokens_per_s": 0.0}
    assert pretrain(configured(prefix, parts, **changes, load=save, save=save), world_size=1) == 0
    assert "nothing to do: all 96 sequences of the run are done, at iteration 9\n" in capsys.readouterr().out


def test_an_end_that_lies_behind_is_refused(prefix: str, straight: Path, tmp_path: Path) -> None:
    changes = {"global_batch_size": 16, "train_iters": 2, "lr_warmup_iters": 0}
    config = configured(prefix, tmp_path, load=half(straight), **changes)
    with pytest.raises(UsageError, match=r"end after 32 sequences \(2 iterations of 16\), but .* trained on 48; raise"):
        pretrain(config, world_size=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_lengths_of_sequences_keep_the_tokens(
    prefix: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(prefix, tmp_path, load=half(straight), seq_length=32, global_batch_size=4)
    assert pretrain(config, world_size=1) == 0
    output = capsys.readouterr().out
    assert "24 of 48 sequences done; 6 iterations of 4 to go, up to iteration 12\n" in output
    assert "note: the order of the data may differ from here on\n" in output
    assert rows(tmp_path)[-1]["tokens"] == rows(straight)[-1]["tokens"]
