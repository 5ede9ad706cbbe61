"""Tokenizers: SentencePiece models, Hugging Face ``tokenizer.json`` files, and none for tokenized data.

Megatron-Core has tokenizer classes of its own. They are not used here because its Hugging Face class takes a model
folder or hub name (not a ``tokenizer.json``), needs ``transformers`` and may come back without an end-of-document
token; because its cache keys name the path of a tokenizer rather than its content; and because every preprocessing
worker would have to import torch. What ``GPTDatasetConfig`` asks of a tokenizer is small: see :class:`Tokenizer`.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import not_local, read_json, read_small, write_atomically

END_OF_DOCUMENT = "<|endoftext|>"
MODEL_TYPES = ("bpe", "unigram")
NULL_PREFIX = "null:"

# SentencePiece writes a space as this character, so a literal one in the text would come back as a space.
_SPACE_SYMBOL = "\u2581"
# Names that published tokenizers give to their end-of-document token, looked up where no config names it.
_KNOWN_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class Tokenizer(ABC):
    """A tokenizer as this project and Megatron's ``GPTDatasetConfig`` use it.

    Attributes:
        vocab_size: number of token ids; every id is in ``[0, vocab_size)``.
        eod: id of the end-of-document token.
        pad: id of the padding token; -1, which is in no data, stands for none.
        unique_identifiers: what Megatron's index cache knows the tokenizer by: its content, not its path.
    """

    vocab_size: int
    eod: int
    pad: int = -1
    unique_identifiers: dict[str, str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without an end-of-document token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    The models of :func:`train_sentencepiece` give every text back exactly. Control tokens such as the
    end-of-document token decode to nothing.

    Args:
        serialized: content of the ``.model`` file.
        source: how errors name the model.

    Raises:
        UsageError: when ``serialized`` is no SentencePiece model, or has no end-of-document (``eos``) token.
    """

    def __init__(self, serialized: bytes, source: str = "the SentencePiece model") -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(serialized)
        except RuntimeError as error:
            raise UsageError(
                f"{source} is not a whole SentencePiece model; give a .model file of sentencepiece or of "
                "tools/train_tokenizer.py"
            ) from error
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise UsageError(f"{source} has no end-of-document token; train it with an eos piece")
        pad = int(self._processor.pad_id())
        self.pad = -1 if pad == self.eod else pad
        self.unique_identifiers = _identifiers("sentencepiece", serialized)
        self._space_symbol_bytes = self._find_space_symbol_bytes()

    def _find_space_symbol_bytes(self) -> list[int]:
        """Return the byte tokens of a literal U+2581; none when the model cannot spell it between two texts."""
        adds_prefix = self._processor.encode("a", out_type=str)[0].startswith(_SPACE_SYMBOL)
        ids = [int(self._processor.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_SYMBOL.encode()]
        has_bytes = all(self._processor.is_byte(token) for token in ids)
        return ids if has_bytes and not adds_prefix else []

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without an end-of-document token."""
        if _SPACE_SYMBOL not in text or not self._space_symbol_bytes:
            return list(self._processor.encode(text))
        first, *others = text.split(_SPACE_SYMBOL)
        ids = list(self._processor.encode(first))
        for part in others:
            ids += self._space_symbol_bytes
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens are left out."""
        return str(self._processor.decode([int(token) for token in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library.

    Args:
        path: the ``tokenizer.json``; a ``tokenizer_config.json`` beside it may name the end-of-document token
            (``eos_token``), else one of the usual names is looked for.

    Raises:
        UsageError: when the file is no such tokenizer, or has no end-of-document token.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        serialized = read_small(path)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(serialized)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a Hugging Face tokenizer.json ({_one_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod = self._find_end_token(path, vocabulary)
        self.unique_identifiers = _identifiers("huggingface", serialized)

    @staticmethod
    def _find_end_token(path: Path, vocabulary: dict[str, int]) -> int:
        config = path.with_name("tokenizer_config.json")
        names = [_read_eos_token(config)] if config.is_file() else []
        for name in (*names, *_KNOWN_END_TOKENS):
            if name is not None and name in vocabulary:
                return vocabulary[name]
        raise UsageError(
            f"{path} has no end-of-document token (none of {', '.join(_KNOWN_END_TOKENS)}); "
            f'name one of its tokens in {config}: {{"eos_token": "..."}}'
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without any special token added.

        Raises:
            UsageError: the tokenizer cannot spell it.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"the tokenizer cannot encode a text ({_one_line(error)}); give a whole one") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))


class NullTokenizer(Tokenizer):
    """No tokenizer, for data that is tokenized already: "text" is token ids between white space.

    Args:
        vocab_size: number of token ids; the last one is the end-of-document token.

    Raises:
        UsageError: when ``vocab_size`` is not in ``[2, 2**31)``.
    """

    def __init__(self, vocab_size: int) -> None:
        if not 2 <= vocab_size < 2**31:
            raise UsageError(f"{NULL_PREFIX}{vocab_size} is out of range; give a vocabulary size from 2 to {2**31 - 1}")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.unique_identifiers = {"class": "null", "vocab_size": str(vocab_size)}

    def encode(self, text: str) -> list[int]:
        """Return the ids written in ``text``.

        Raises:
            UsageError: for a word that is not a number in ``[0, vocab_size)``.
        """
        ids = []
        for word in text.split():
            if not (_is_decimal(word) and int(word) < self.vocab_size):
                raise UsageError(
                    f"{word[:40]!r} is not a token id below {self.vocab_size}; the tokenizer "
                    f"{NULL_PREFIX}{self.vocab_size} reads ids between white space"
                )
            ids.append(int(word))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as decimal numbers, a space between two."""
        return " ".join(str(int(token)) for token in ids)


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: a SentencePiece ``.model`` file, a Hugging Face ``tokenizer.json`` (any name in ``.json``), or
            ``null:VOCAB_SIZE`` for tokenized data.

    Raises:
        UsageError: when ``spec`` is none of these, the file is missing, broken or of another kind, or the tokenizer
            has no end-of-document token.
    """
    name = os.fspath(spec)
    if name.startswith(NULL_PREFIX):
        size = name.removeprefix(NULL_PREFIX)
        if not _is_decimal(size):
            raise UsageError(f"{name} names no vocabulary size; write {NULL_PREFIX}32000, say")
        return NullTokenizer(int(size))
    if fault := not_local(name):
        raise UsageError(f"tokenizer {fault}")
    path = Path(name)
    if path.suffix not in (".model", ".json"):
        raise UsageError(
            f"tokenizer {name} is of no known kind; give a SentencePiece .model, a Hugging Face tokenizer.json "
            f"or {NULL_PREFIX}VOCAB_SIZE"
        )
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(read_small(path), name)
        return HuggingFaceTokenizer(path)
    except OSError as error:
        raise UsageError(f"tokenizer {name} cannot be read: {error.strerror}; check the path") from error


def train_sentencepiece(
    texts: Iterable[str],
    prefix: str | os.PathLike[str],
    *,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
) -> Path:
    """Train a SentencePiece model that gives every text back exactly.

    There is no normalization, white space is kept as it is (runs of it may become tokens), characters outside the
    vocabulary are spelled in bytes, and ``<|endoftext|>`` (id 1) is the end-of-document token. The same texts in the
    same order give the same file.

    Args:
        texts: the documents to learn from; all of them are held in memory.
        prefix: the model is written to ``prefix.model``.
        vocab_size: number of tokens, the 256 bytes and two special tokens included.
        model_type: ``"bpe"`` or ``"unigram"`` (about ten times slower).
        character_coverage: share of the characters in ``texts`` that get a token of their own; the rest are bytes.

    Returns:
        The path of the model.

    Raises:
        UsageError: when an argument is out of range, or ``vocab_size`` does not suit the texts.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise UsageError(f"model type {model_type} is not known; choose one of {', '.join(MODEL_TYPES)}")
    if not 0.98 <= character_coverage <= 1.0:
        raise UsageError(f"character coverage {character_coverage} is out of range; give a number from 0.98 to 1")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            # Longer sentences are left out in silence, and here a sentence is a document.
            max_sentence_length=2**30,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot be trained on these texts: {_one_line(error).rpartition('] ')[2]}"
        ) from error
    path = Path(f"{os.fspath(prefix)}.model")
    write_atomically(path, model.getvalue(), remedy="choose another --output")
    return path


def _read_eos_token(config: Path) -> str | None:
    """Return the ``eos_token`` of a ``tokenizer_config.json``: a string, or an object with its ``content``."""
    try:
        fields = read_json(config)
    except ValueError as error:
        raise UsageError(f"{config} is not JSON ({_one_line(error)}); mend or remove it") from error
    token = fields.get("eos_token") if isinstance(fields, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _is_decimal(word: str) -> bool:
    """Return whether ``word`` is a number of a sane length: Python refuses to parse thousands of digits."""
    return word.isascii() and word.isdigit() and len(word) <= 12


def _identifiers(kind: str, content: bytes) -> dict[str, str]:
    return {"class": kind, "sha256": hashlib.sha256(content).hexdigest()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
