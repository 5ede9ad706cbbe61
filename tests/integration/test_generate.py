"""tools/generate.py and tools/evaluate.py against the model itself and transformers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.convert import huggingface
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.verify import logits_of_transformers
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.evaluation import windows
from megatron_hyperp.training.inference import model_on_one_rank
from tests import tolerances
from tests.random_source import write_random
from tests.toy import EXPERTS, VOCABULARY, write_corpus
from tools import evaluate, generate


@pytest.mark.parametrize("overrides", [{}, EXPERTS], ids=["dense", "experts"])
def test_greedy_tokens_are_the_likeliest(
    tmp_path: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_random(tmp_path / "a", **overrides)
    generate.main([str(tmp_path / "a"), "--prompt", "5 9 2", "--max-new-tokens", "12"])
    printed = [int(word) for word in capsys.readouterr().out.removeprefix("5 9 2").split()]
    source = HyperPSource(tmp_path / "a")
    tokens = [5, 9, 2]
    with model_on_one_rank(source.config, source.read) as logits:
        while len(tokens) < 3 + len(printed):
            tokens.append(int(logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert len(printed) > 3
    assert tokens[3:] == printed


def test_sampling_follows_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "a")
    words = [
        str(tmp_path / "a"),
        "--prompt",
        "5 9 2",
        "--temperature",
        "1",
        "--samples",
        "2",
        "--max-new-tokens",
        "20",
        "--seed",
    ]
    told = []
    for seed in ("1", "1", "2"):
        generate.main([*words, seed])
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]
    first, second = told[0].split("---\n")
    assert first != second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "64", "--prompt", "1"], "more than the 64 that the model has positions for"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--top-p", "0"], "--top-p 0"),
        (["--samples", "2"], "do nothing when greedy"),
        (["--tokenizer", "/nowhere.model"], "/nowhere.model"),
    ],
)
def test_refusals(tmp_path: Path, flags: list[str], message: str) -> None:
    write_random(tmp_path / "a")
    with pytest.raises(UsageError, match=message):
        generate.main([str(tmp_path / "a"), *flags])


def test_windows_hold_every_token_once(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, documents=3)
    whole = [token for window in windows(prefix, 10**6, None) for token in window]
    cut = list(windows(prefix, 64, None))
    assert [cut[0][0], *(token for window in cut for token in window[1:])] == whole
    assert all(window[0] == before[-1] for before, window in itertools.pairwise(cut))
    assert sum(len(window) - 1 for window in windows(prefix, 64, 100)) == 100


@pytest.mark.parametrize("overrides", [{}, EXPERTS], ids=["dense", "experts"])
def test_loss_is_that_of_transformers(
    tmp_path: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_corpus(tmp_path, documents=4)
    source = write_random(tmp_path / "a", **overrides)
    evaluate.main([str(tmp_path / "a"), "--data-path", prefix, "--micro-batch-size", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    (tmp_path / "hf").mkdir()
    huggingface.write(
        tmp_path / "hf", source, dtype=None, shard_bytes=10**9, tokenizer=f"null:{VOCABULARY}", advance=lambda _: None
    )
    losses = []
    for window in windows(prefix, 64, None):
        tokens = torch.tensor([window])
        logits = logits_of_transformers(tmp_path / "hf", tokens[:, :-1])
        losses += torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none").tolist()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=tolerances.LAYOUT_LOSS)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
