"""Random documents, for benchmarks whose result does not depend on what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


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
