"""What a training reads, in one process: the test set at its end, splits without validation, synthetic data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.data.batches import batches
from megatron_hyperp.data.mock import mock_datasets
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import preflight
from megatron_hyperp.training.logging import read_metrics
from tests.toy import toy_config, write_corpus
from tools import evaluate

SMALL: dict[str, Any] = {"num_layers": 1, "train_iters": 4, "quiet": True, "heartbeat_interval": 0.0, "eval_iters": 2}
MOCK = {"mock_data": True, "data_path": [], "tokenizer_model": None}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    device.adapt_megatron()
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=300)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def train(prefix: str, run_dir: Path, **overrides: Any) -> list[dict[str, Any]]:
    from megatron_hyperp.training.pretrain import pretrain

    assert pretrain(toy_config(prefix, run_dir, **{**SMALL, **overrides}), world_size=1) == 0
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in read_metrics(run_dir)]


def test_the_test_set_is_evaluated_at_the_end(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the weights of the last iteration; not where the run stops before, nor with evaluation off."""
    flags = {"eval_interval": 2, "split": "80,10,10", "save": str(tmp_path / "ckpt")}
    rows = train(prefix, tmp_path / "whole", **flags)
    [tested] = [row for row in rows if "test_loss" in row]
    assert (tested["iteration"], tested["tokens"]) == (4, 4 * 32 * 64)
    assert f"test loss {tested['test_loss']:.4f} at iteration 4" in capsys.readouterr().out
    evaluate.main([str(tmp_path / "ckpt"), "--data-path", prefix, "--split", "test", "--json"])
    found = json.loads(capsys.readouterr().out)
    # The trainer cuts the same documents into samples at other places.
    assert found["loss"] == pytest.approx(tested["test_loss"], rel=0.01)
    assert found["tokens"] < 0.2 * 300 * 100
    stopped = train(prefix, tmp_path / "stopped", eval_interval=2, split="80,10,10", exit_interval=2)
    assert stopped == rows[: len(stopped)]
    assert not [row for row in train(prefix, tmp_path / "off", split="80,10,10") if "test_loss" in row]


def test_a_test_share_without_a_sample_does_not_stop_a_run(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(prefix, tmp_path, train_iters=1, eval_interval=1, split="969,30,1", quiet=False, seq_length=256)
    assert not [row for row in rows if "test_loss" in row]
    assert "no evaluation on the test set: the test share of" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["100,0,0", "9999,1,0"])
def test_a_split_without_validation_names_the_flag_to_set(prefix: str, tmp_path: Path, split: str) -> None:
    """Before any process group exists."""
    config = toy_config(prefix, tmp_path, **{**SMALL, "split": split, "eval_interval": 100})
    with pytest.raises(UsageError, match=r"such as 99,1,0, .* train without validation: --eval-interval 0$") as caught:
        preflight.check(config, 1)
    assert caught.value.same_on_all_ranks
    config.training.eval_interval = 0
    preflight.check(config, 1)


def test_mock_data_is_the_same_for_any_layout_worker_and_start() -> None:
    options: dict[str, Any] = {"seq_length": 16, "vocab_size": 50, "num_samples": (64, 8, 0)}
    first, again, other = (mock_datasets(seed=seed, **options) for seed in (1, 1, 2))
    assert first.train is not None
    assert first.valid is not None
    assert first.test is None
    whole = [batch["tokens"] for batch in itertools.islice(batches(first.train, micro_batch_size=8), 8)]
    parts = [
        itertools.islice(
            batches(again.train, micro_batch_size=4, data_parallel_rank=rank, data_parallel_size=2, num_workers=rank), 8
        )
        for rank in range(2)
    ]
    halves = [torch.cat([each["tokens"] for each in pair]) for pair in zip(*parts, strict=True)]
    assert all(torch.equal(one, two) for one, two in zip(whole, halves, strict=True))
    later = next(batches(again.train, micro_batch_size=8, consumed_samples=24))
    assert torch.equal(later["tokens"], whole[3])
    assert torch.equal(later["labels"][:, :-1], later["tokens"][:, 1:])
    assert int(later["labels"].max()) < 50
    assert not torch.equal(next(batches(other.train, micro_batch_size=8))["tokens"], whole[0])
    assert not torch.equal(next(batches(first.valid, micro_batch_size=8))["tokens"], whole[0])


def test_mock_data_trains_and_resumes(tmp_path: Path) -> None:
    """Without corpus and tokenizer; to the bit."""
    straight = train("", tmp_path / "a", eval_interval=2, num_workers=1, **MOCK)
    place = {"save": str(tmp_path / "ckpt"), "load": str(tmp_path / "ckpt"), "eval_interval": 2, **MOCK}
    train("", tmp_path / "b", exit_interval=3, **place)
    resumed = train("", tmp_path / "b", **place)
    assert resumed == straight
    assert {"eval_loss", "test_loss", "loss"} <= {name for row in resumed for name in row}
    assert not list(tmp_path.rglob("*.npy"))


def test_mock_data_has_the_papers_vocabulary_by_default(tmp_path: Path) -> None:
    config, tokenizer, *_ = preflight.check(toy_config("", tmp_path, **{**SMALL, **MOCK, "vocab_size": None}), 1)
    assert tokenizer is None
    assert config.model.vocab_size == 32000
