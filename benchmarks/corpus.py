"""Random documents, for benchmarks whose result does not depend on what is read; and text, as bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_hyperp.data.corpus import python_corpus_paths


def write_corpus(folder: Path, vocabulary: int) -> str:
    """Write 2,000 documents of 500 random tokens in Megatron's format; return their prefix.

    Args:
        folder: of the files.
        vocabulary: tokens are below it; at most 65,536.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, random = str(folder / "random"), np.random.default_rng(0)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for _ in range(2000):
        builder.add_item(torch.from_numpy(random.integers(vocabulary, size=500)))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


def write_text(folder: Path, *, max_bytes: int) -> str:
    """Write source and documentation of the installed Python in Megatron's format, a token a byte; return their prefix.

    Args:
        folder: of the files.
        max_bytes: size of the text.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "text")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for path in python_corpus_paths(max_bytes=max_bytes):
        builder.add_item(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).int())
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix
