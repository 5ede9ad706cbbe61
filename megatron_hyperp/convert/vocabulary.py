"""Rows of the embedding and of the output layer that are padding: cut from exports, added to imports.

Trainings pad the vocabulary to a multiple that tensor-parallel ranks can share. No tokenizer knows the ids beyond, and
exports do not have them; the rows that are cut are stored next to the weights, for the way back.
"""

from __future__ import annotations

import copy

import torch

from megatron_hyperp.config import Config
from megatron_hyperp.convert.source import Source
from megatron_hyperp.data.tokenizer import Tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.resolve import padded_vocabulary

VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


class ResizedSource(Source):
    """Another source with a vocabulary of other size: rows are cut, or zeros added.

    A row of zeros in the output layer gives its id the logit 0.

    Args:
        source: to read from.
        rows: of the embedding and the output layer.
    """

    def __init__(self, source: Source, rows: int) -> None:
        self._source = source
        self.config = copy.deepcopy(source.config)
        self.config.model.vocab_size = rows
        self.extras = source.extras

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""
        return self._source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter: [rows, hidden size] if it is of the vocabulary."""
        tensor = self._source.read(name)
        return resized(tensor, self.config.model.vocab_size) if name in VOCABULARY_WEIGHTS else tensor


def resized(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the first rows of a matrix, contiguous, or the matrix with rows of zeros after its own."""
    if rows <= len(tensor):
        return tensor[:rows].contiguous()
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])


def export_rows(config: Config, tokenizer: Tokenizer | None, *, keep_padding: bool) -> int:
    """Return how many rows of the embedding an export has.

    Args:
        config: of the model; older versions did not record its vocabulary before padding.
        tokenizer: that goes with the export, or at least the training's; None if there is none at hand.
        keep_padding: whether it has all of them.

    Raises:
        UsageError: the tokenizer knows more tokens than the model has rows.
    """
    model = config.model
    tokens = tokenizer.vocab_size if tokenizer else 0
    if tokens > model.vocab_size:
        raise UsageError(
            f"the tokenizer knows {tokens} tokens, and the model has an embedding of {model.vocab_size} rows; give the"
            " tokenizer of the training with --tokenizer"
        )
    known = max(model.unpadded_vocab_size or 0, tokens)
    return known if known and not keep_padding else model.vocab_size


def unknown_ids(tokenizer: Tokenizer | None, rows: int) -> list[int]:
    """Return the ids below ``rows`` that stand for no token, and must not be sampled."""
    return [] if tokenizer is None else [token for token in range(rows) if not tokenizer.knows(token)]


def padded_for_ranks(source: Source, tensor_ranks: int) -> Source:
    """Return a source whose vocabulary tensor-parallel ranks can share, padded if they cannot share it as it is.

    It is padded as Megatron-LM pads for so many ranks: to a multiple of ``make_vocab_size_divisible_by`` x ranks.
    """
    model = source.config.model
    if model.vocab_size % tensor_ranks == 0:
        return source
    multiple = model.make_vocab_size_divisible_by * tensor_ranks
    rows = padded_vocabulary(model.vocab_size, multiple, tensor_ranks)
    return ResizedSource(source, rows)
