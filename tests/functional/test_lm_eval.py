"""An export to Hugging Face under EleutherAI's lm-evaluation-harness, with a task of our own and no network."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hyperp.convert import huggingface
from megatron_hyperp.data.corpus import python_corpus_paths
from megatron_hyperp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_hyperp.training.inference import model_on_one_rank
from tests.random_source import RandomSource, model_config

pytestmark = pytest.mark.slow
TEXTS = ("def main(argv):\n    return 0\n", "import os\nimport sys\n")


def test_bits_per_byte_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm-eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    sources = [path.read_text(errors="replace") for path in python_corpus_paths(max_bytes=500_000)]
    path = train_sentencepiece(sources, tmp_path / "tokenizer", vocab_size=500)
    tokenizer = load_tokenizer(path)
    source = RandomSource(model_config(vocab_size=tokenizer.vocab_size, tokenizer_model=str(path)))
    (tmp_path / "hf").mkdir()
    huggingface.write(
        tmp_path / "hf", source, dtype=None, shard_bytes=10**9, tokenizer=str(path), advance=lambda _: None
    )
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = {
        "task": "offline",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "offline.yaml").write_text(yaml.safe_dump(task))
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32"},
        tasks=["offline"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        device="cpu",
        batch_size=1,
    )
    nats = 0.0
    with model_on_one_rank(source.config, source.read) as logits:
        for text in TEXTS:
            tokens = torch.tensor([[tokenizer.eod, *tokenizer.encode(text)]])
            scores = logits(tokens[:, :-1])[0].double().log_softmax(-1)
            nats -= float(scores.gather(1, tokens[0, 1:, None]).sum())
    bits = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert result["results"]["offline"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
