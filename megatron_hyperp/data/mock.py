"""Synthetic samples for smoke tests and measurements of speed: sequences that count upwards, without a corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_hyperp.data.batches import Batch
from megatron_hyperp.data.datasets import Datasets


class MockDataset(Dataset[Batch]):
    """Samples that follow from the seed and their number alone, so that layouts, workers and resumptions agree.

    Megatron-Core's ``MockGPTDataset`` has data of the same kind, but shuffles 100,000 documents for each epoch in every
    process, which a long run takes minutes and gigabytes for.

    Args:
        num_samples: length of the dataset.
        seq_length: tokens per sample.
        vocab_size: token ids are below it.
        seed: of the first token of each sample.
        part: of the split: 0, 1 or 2; each has samples of its own.
    """

    def __init__(self, num_samples: int, seq_length: int, vocab_size: int, seed: int, part: int) -> None:
        self._num_samples, self._seq_length, self._vocab_size = num_samples, seq_length, vocab_size
        self._seed = (seed, part)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Batch:
        """Return a sample with the fields of :func:`megatron_hyperp.data.datasets.build_datasets`."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        first = int(np.random.default_rng((*self._seed, index)).integers(self._vocab_size))
        text = torch.arange(first, first + self._seq_length + 1) % self._vocab_size
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self._seq_length),
            "position_ids": torch.arange(self._seq_length),
        }


def mock_datasets(*, seq_length: int, vocab_size: int, seed: int, num_samples: Sequence[int]) -> Datasets:
    """Return synthetic training, validation and test sets; None where no samples are asked for.

    Args:
        seq_length: tokens per sample.
        vocab_size: token ids are below it.
        seed: of the samples.
        num_samples: of training, validation and test.
    """
    sets = [
        MockDataset(size, seq_length, vocab_size, seed, part) if size else None for part, size in enumerate(num_samples)
    ]
    return Datasets(*sets)
