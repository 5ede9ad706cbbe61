"""Ranks build the datasets that one process builds, at the same time and in one cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import device
from megatron_hyperp.data.batches import batches
from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.datasets import Datasets, build_datasets
from megatron_hyperp.data.indexed import write_corpus
from megatron_hyperp.data.tokenizer import NullTokenizer
from tests.run_distributed import run_distributed

SEQ_LENGTH = 16
TOKENIZER = NullTokenizer(5000)


def make_corpus(prefix: Path, first: int) -> str:
    texts = (" ".join(map(str, range(start, start + 30))) for start in range(first, first + 1200, 30))
    write_corpus([Document(text, len(text)) for text in texts], prefix, TOKENIZER)
    return str(prefix)


def build(data_path: list[str], **changes: Any) -> Datasets:
    options: dict[str, Any] = {"split": "90,10,0", "seq_length": SEQ_LENGTH, "seed": 7, "num_samples": (64, 8, 0)}
    return build_datasets(data_path=data_path, tokenizer=TOKENIZER, **options, **changes)


def first_tokens(data_path: list[str]) -> list[torch.Tensor]:
    """Of two micro-batches of this rank, from the training and the validation share: (2, 2, SEQ_LENGTH) each."""
    device.init_process_group(1)
    rank = torch.distributed.get_rank()
    found = []
    for dataset in build(data_path)[:2]:
        assert dataset is not None
        loader = batches(dataset, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2)
        found.append(torch.stack([next(loader)["tokens"] for _ in range(2)]))
    return found


def test_two_ranks_build_the_datasets_of_one_process(tmp_path: Path) -> None:
    data_path = ["0.5", make_corpus(tmp_path / "a", 0), "0.5", make_corpus(tmp_path / "b", 2000)]
    ranks = run_distributed(first_tokens, 2, data_path)
    alone = build(data_path, cache_path=tmp_path / "other")
    for number, dataset in enumerate((alone.train, alone.valid)):
        assert dataset is not None
        expected = next(batches(dataset, micro_batch_size=8))["tokens"].view(2, 2, 2, SEQ_LENGTH)
        for micro_batch, rank in itertools.product(range(2), range(2)):
            assert torch.equal(ranks[rank][number][micro_batch], expected[micro_batch, rank])
