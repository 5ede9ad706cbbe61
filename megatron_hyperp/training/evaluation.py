"""Loss of a model on all of a corpus, each token once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_hyperp.training.inference import Logits


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: that were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def windows(prefix: str, length: int, most: int | None, which: range | None = None) -> Iterator[list[int]]:
    """Yield the tokens of a corpus, documents one after the other, in windows that share one token.

    Args:
        prefix: of the corpus.
        length: tokens that a window predicts; the last one may have fewer.
        most: tokens to predict in all; None for all but the first.
        which: documents to read; None for all.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(prefix)
    numbers = range(len(documents)) if which is None else which
    stream = (int(token) for number in numbers for token in documents[number])
    window = list(itertools.islice(stream, 1))
    left = math.inf if most is None else most
    while left:
        taken = list(itertools.islice(stream, int(min(length, left))))
        if not taken:
            return
        yield window + taken
        window, left = taken[-1:], left - len(taken)


def evaluate(logits: Logits, sequences: Iterator[list[int]], batch_size: int) -> Evaluation:
    """Return the mean loss of all tokens but each window's first.

    Args:
        logits: of a model.
        sequences: windows of :func:`windows`, of which the last may be shorter.
        batch_size: windows at a time.

    Raises:
        ValueError: there is no token to predict.
    """
    total, count = 0.0, 0
    for _, group in itertools.groupby(sequences, key=len):
        # Only windows of one length go together.
        while batch := list(itertools.islice(group, batch_size)):
            tokens = torch.tensor(batch)
            found = logits(tokens[:, :-1]).float().flatten(0, 1)
            labels = tokens[:, 1:].flatten().to(found.device)
            total += float(torch.nn.functional.cross_entropy(found, labels, reduction="sum").double())
            count += labels.numel()
    if not count:
        raise ValueError("there is no token to predict")
    return Evaluation(total / count, count)
