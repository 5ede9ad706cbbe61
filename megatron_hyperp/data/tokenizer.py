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

from megatron_hyperp.data.tokenizer_files import (
    TOKENIZER_CONFIG,
    find_tokenizer,
    is_json,
    read_tokenizer_config,
    special_token,
)
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import not_local, read_small, write_atomically

END_OF_DOCUMENT = "<|endoftext|>"
MODEL_TYPES = ("bpe", "unigram")
NULL_PREFIX = "null:"

# SentencePiece writes a space as this character, so a literal one in the text would come back as a space.
_SPACE_SYMBOL = "\u2581"
# Names that published tokenizers give to their end-of-document token, looked up where no config names it.
_KNOWN_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
# And to their beginning-of-sequence token, where the post-processor adds none.
_KNOWN_BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")


class Tokenizer(ABC):
    """A tokenizer as this project and Megatron's ``GPTDatasetConfig`` use it.

    Attributes:
        vocab_size: number of token ids; every id is in ``[0, vocab_size)``.
        eod: id of the end-of-document token.
        bos: id of the beginning-of-sequence token; -1 if there is none.
        adds_bos: whether the tokenizer's own file puts that token before every text. :meth:`encode` never does: a
            corpus has it if ``tools/preprocess_data.py --prepend-bos`` wrote it.
        pad: id of the padding token; -1, which is in no data, stands for none.
        unique_identifiers: what Megatron's index cache knows the tokenizer by: its content, not its path.
    """

    vocab_size: int
    eod: int
    bos: int = -1
    adds_bos: bool = False
    pad: int = -1
    unique_identifiers: dict[str, str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without an end-of-document token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids.

        Raises:
            UsageError: an id that the tokenizer does not know.
        """
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not self.knows(token):
                raise UsageError(
                    f"token id {token} is not in the tokenizer's vocabulary of {self.vocab_size} and has no text; give"
                    " the tokenizer that the data or the model were made with"
                )
        return self._decode(tokens)

    @abstractmethod
    def _decode(self, tokens: list[int]) -> str:
        """Return the text of ids that are all known."""

    def knows(self, token: int) -> bool:
        """Return whether an id stands for a token: ids at or above ``vocab_size`` do not, nor do gaps below it."""
        return 0 <= token < self.vocab_size

    def document_start(self, *, prepend_bos: bool) -> list[int]:
        """Return the tokens before the text of a document: the beginning-of-sequence token, or none.

        Raises:
            UsageError: the tokenizer has no such token.
        """
        if not prepend_bos:
            return []
        if self.bos < 0:
            raise UsageError(
                "--prepend-bos needs a tokenizer with a beginning-of-sequence token, and this one has none; leave it"
                f' out, or name a token in {TOKENIZER_CONFIG}: {{"bos_token": "..."}}'
            )
        return [self.bos]


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
                f"{source} is not a whole SentencePiece model, nor a Hugging Face tokenizer.json; give a .model file "
                "of sentencepiece or of tools/train_tokenizer.py, or a tokenizer.json"
            ) from error
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise UsageError(f"{source} has no end-of-document token; train it with an eos piece")
        self.bos = int(self._processor.bos_id())
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

    def _decode(self, tokens: list[int]) -> str:
        """Return the text; control tokens are left out."""
        return str(self._processor.decode(tokens))


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library.

    Args:
        path: of the ``tokenizer.json``; a ``tokenizer_config.json`` next to it may name the end-of-document token
            (``eos_token``) and the beginning-of-sequence token (``bos_token``), else the usual names are looked for;
            its ``split_special_tokens`` says that special tokens in a text are spelled in pieces.
        serialized: content of the file.

    Raises:
        UsageError: when the file is no such tokenizer, or has no end-of-document token.
    """

    def __init__(self, path: Path, serialized: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(serialized)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a Hugging Face tokenizer.json ({_one_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = path.with_name(TOKENIZER_CONFIG)
        self.splits_special_tokens = read_tokenizer_config(config).get("split_special_tokens") is True
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._known = frozenset(vocabulary.values())
        self.vocab_size = max(self._known, default=-1) + 1
        self.eod = self._find_end_token(path, config, vocabulary)
        before = self._put_before_texts()
        self.adds_bos = len(before) == 1
        names = (special_token(config, "bos_token"), *_KNOWN_BEGIN_TOKENS)
        named = [vocabulary[name] for name in names if name in vocabulary]
        self.bos = before[0] if self.adds_bos else next(iter(named), -1)
        self.unique_identifiers = _identifiers("huggingface", serialized)

    @staticmethod
    def _find_end_token(path: Path, config: Path, vocabulary: dict[str, int]) -> int:
        for name in (special_token(config, "eos_token"), *_KNOWN_END_TOKENS):
            if name is not None and name in vocabulary:
                return vocabulary[name]
        raise UsageError(
            f"{path} has no end-of-document token (none of {', '.join(_KNOWN_END_TOKENS)}); "
            f'name one of its tokens in {config}: {{"eos_token": "..."}}'
        )

    def _put_before_texts(self) -> list[int]:
        """Return the tokens that the post-processor puts before every text."""
        try:
            encoding = self._tokenizer.encode("a")
        except Exception:  # the library raises nothing narrower; a tokenizer need not be able to spell an a
            return []
        # Added tokens are marked; the text's own ones end them.
        mask = encoding.special_tokens_mask
        return list(encoding.ids[: mask.index(0)]) if 0 in mask else []

    def knows(self, token: int) -> bool:
        """Return whether an id stands for a token; ids in a file may leave gaps."""
        return token in self._known

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without any special token added.

        Raises:
            UsageError: the tokenizer cannot spell it.
        """
        # Set at each call, because a copy in another process loses it.
        self._tokenizer.encode_special_tokens = self.splits_special_tokens
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"the tokenizer cannot encode a text ({_one_line(error)}); give a whole one") from error

    def _decode(self, tokens: list[int]) -> str:
        """Return the text, special tokens included."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


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

    def _decode(self, tokens: list[int]) -> str:
        """Return the ids as decimal numbers, a space between two."""
        return " ".join(map(str, tokens))


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: a SentencePiece model, a Hugging Face ``tokenizer.json`` (either by any name: its content decides), a
            folder that holds one of them, or ``null:VOCAB_SIZE`` for tokenized data.

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
    path = find_tokenizer(name)
    try:
        content = read_small(path)
        if is_json(path, content):
            return HuggingFaceTokenizer(path, content)
    except OSError as error:
        raise UsageError(f"tokenizer {path} cannot be read: {error.strerror}; check the path") from error
    tokenizer = SentencePieceTokenizer(content, str(path))
    config = read_tokenizer_config(path.with_name(TOKENIZER_CONFIG))
    llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    # Transformers' class for these models adds it unless the config says otherwise.
    tokenizer.adds_bos = tokenizer.bos >= 0 and config.get("add_bos_token", llama) is True
    return tokenizer


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


def _is_decimal(word: str) -> bool:
    """Return whether ``word`` is a number of a sane length: Python refuses to parse thousands of digits."""
    return word.isascii() and word.isdigit() and len(word) <= 12


def _identifiers(kind: str, content: bytes) -> dict[str, str]:
    return {"class": kind, "sha256": hashlib.sha256(content).hexdigest()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
