"""A toy corpus and config that every test of training shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.data.corpus import python_corpus_paths
from megatron_hyperp.training.logging import read_metrics
from tests.run_distributed import run_distributed

VOCABULARY = 64
# Fields that make a mixture of experts of :func:`toy_config`.
EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
# Flags of a small model of the paper's shape, and what makes experts of it, for plans and what is built by them.
SMALL = "--depth 4 --aspect-ratio 32 --vocab-size 512 --train-iters 1 --global-batch-size 24 --seq-length 64"
MOE = "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64"
TP2SP = "--tensor-model-parallel-size 2 --sequence-parallel"


def write_corpus(folder: Path, *, documents: int = 2000, seed: int = 0, vocabulary: int = VOCABULARY) -> str:
    """Write a corpus whose next token mostly follows from the last, and return its prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(seed)
    prefix = str(folder / "toy")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    successor = random.permutation(vocabulary)
    for _ in range(documents):
        tokens = [int(random.integers(vocabulary))]
        for _ in range(int(random.integers(50, 150))):
            tokens.append(int(successor[tokens[-1]]) if random.random() < 0.8 else int(random.integers(vocabulary)))
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


def write_text_corpus(folder: Path, *, max_bytes: int = 4_000_000) -> str:
    """Write Python's own sources as documents of bytes (vocabulary 256), and return their prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "text")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for path in python_corpus_paths(max_bytes=max_bytes):
        builder.add_item(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).int())
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


def toy_config(prefix: str, run_dir: Path, **overrides: Any) -> Config:
    """Return a four-layer config that trains in a second; ``overrides`` name fields of any section."""
    fields = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 64,
        "vocab_size": VOCABULARY,
        "data_path": [prefix],
        "split": "90,10,0",
        "tokenizer_model": f"null:{VOCABULARY}",
        "run_dir": str(run_dir),
        "micro_batch_size": 8,
        "global_batch_size": 32,
        "train_iters": 20,
        "lr": 0.05,
        "log_interval": 1,
        "eval_interval": 0,
        "distributed_timeout_minutes": 2,
        "stability_interval": 0,
        **overrides,
    }
    config = Config()
    for name in arguments.section_types():
        section = getattr(config, name)
        for key in [key for key in fields if hasattr(section, key)]:
            setattr(section, key, fields.pop(key))
    assert not fields, f"unknown fields {sorted(fields)}"
    return config


def _pretrain(prefix: str, folder: str, fields: dict[str, Any]) -> None:
    from megatron_hyperp.training.pretrain import pretrain

    pretrain(toy_config(prefix, Path(folder), **fields), world_size=int(os.environ["WORLD_SIZE"]))


def rows_of_run(ranks: int, prefix: str, folder: Path, **fields: Any) -> list[dict[str, Any]]:
    """Train :func:`toy_config` with ``fields`` on so many new ranks; return the rows of metrics of its run folder."""
    run_distributed(_pretrain, ranks, prefix, str(folder), fields)
    return read_metrics(folder)


def trained(config: Config) -> tuple[Any, list[dict[str, Any]]]:
    """Train, on a rank whose process group exists; return the trainer and the rows of metrics, written nowhere."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    trainer = Trainer(
        config.resolve(world_size=dist.get_world_size()), load_tokenizer(config.data.tokenizer_model or ""), None
    )
    rows: list[dict[str, Any]] = []
    trainer.writer.write = rows.append  # type: ignore[method-assign,assignment]
    trainer.train()
    trainer.close_reports()
    parallel_state.destroy_model_parallel()
    return trainer, rows


def rows_of_training(config: Config) -> list[dict[str, Any]]:
    """The rows of :func:`trained`."""
    return trained(config)[1]


@contextmanager
def one_rank() -> Iterator[None]:
    """Be a process group of one rank for a while, whatever launched this process."""
    import torch.distributed as dist

    from megatron_hyperp import device

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        device.init_process_group(1)
    yield
    dist.destroy_process_group()
    gc.collect()
