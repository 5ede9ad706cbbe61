"""A SentencePiece model as a fast tokenizer of Hugging Face, with the same ids for every text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hyperp.data.tokenizer import NullTokenizer, SentencePieceTokenizer, load_tokenizer
from megatron_hyperp.errors import UsageError

_SPACE_SYMBOL = "\u2581"
# Far below the sum of any word's scores.
_NEVER = -1e5
# Runs of spaces, a literal space symbol, bytes of characters outside most vocabularies, the special token as text.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\n\treturn  x**2   # 3.14159\r\n",
    f"a{_SPACE_SYMBOL}b {_SPACE_SYMBOL}{_SPACE_SYMBOL} c",
    "Zürich, 東京, Ελλάδα, \U0001f680\U0001f9ea, \u200b\ufeff",
    "<|endoftext|> </s> <unk> <0x41>",
    "aaaaaaaa       aaaa  a",
    "",
    " ",
)


def write(folder: Path, spec: str | None, *, max_length: int) -> int | None:
    """Write the tokenizer's files, and return the id of its end-of-document token.

    Args:
        folder: that is there.
        spec: as in :func:`megatron_hyperp.data.tokenizer.load_tokenizer`; None for no tokenizer.
        max_length: tokens of a sequence.

    Raises:
        UsageError: the tokenizer cannot be read, or gives other ids as a fast tokenizer.
    """
    if spec is None:
        return None
    tokenizer = load_tokenizer(spec)
    if isinstance(tokenizer, NullTokenizer):
        return tokenizer.eod
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = to_fast(Path(spec).read_bytes(), source=spec)
        fast.save(str(folder / "tokenizer.json"))
        # As a text, a special token is spelled in pieces; only its id ends a document.
        fast.encode_special_tokens = True
        _check(fast, tokenizer, spec)
        shutil.copyfile(spec, folder / "tokenizer.model")
        eos = fast.id_to_token(tokenizer.eod)
    else:
        import tokenizers

        shutil.copyfile(spec, folder / "tokenizer.json")
        eos = tokenizers.Tokenizer.from_file(spec).id_to_token(tokenizer.eod)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": isinstance(tokenizer, SentencePieceTokenizer),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return tokenizer.eod


def to_fast(serialized: bytes, *, source: str = "the SentencePiece model") -> Any:
    """Return a ``tokenizers.Tokenizer`` of a SentencePiece model.

    Pieces spell a space as a space, so that a literal U+2581, in no piece then, comes out as bytes, as it does here.

    Args:
        serialized: content of the ``.model``.
        source: how errors name it.

    Raises:
        UsageError: the model normalizes texts, which is not reproduced, or spells no bytes.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, models

    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    rules, trainer = model.normalizer_spec, model.trainer_spec
    for name, value in (
        ("normalization", rules.precompiled_charsmap),
        ("a space put before texts", rules.add_dummy_prefix),
        ("white space removed", rules.remove_extra_whitespaces),
        ("no bytes for unknown characters", not trainer.byte_fallback),
    ):
        if value:
            raise UsageError(
                f"{source} has {name}, which a fast tokenizer would do otherwise; give --tokenizer none, and add the"
                " tokenizer's own files"
            )
    pieces = [(item.piece.replace(_SPACE_SYMBOL, " "), item.score) for item in model.pieces]
    if trainer.model_type == trainer.BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        texts = [number for number, item in enumerate(model.pieces) if _is_text(item)]
        merges = _merges({pieces[number][0]: number for number in texts})
        core: Any = models.BPE(vocabulary, merges, byte_fallback=True, unk_token=pieces[trainer.unk_id][0])
    else:
        core = models.Unigram(_by_score(pieces, model.pieces), unk_id=trainer.unk_id, byte_fallback=True)
    fast = tokenizers.Tokenizer(core)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [
        tokenizers.AddedToken(pieces[number][0], special=True, normalized=False)
        for number, item in enumerate(model.pieces)
        if item.type in (item.CONTROL, item.UNKNOWN)
    ]
    fast.add_special_tokens(special)
    return fast


def _by_score(pieces: list[tuple[str, float]], items: Any) -> list[tuple[str, float]]:
    """Give what stands for no text the lowest score: SentencePiece never finds <unk> or <0x41> in a text."""
    return [(piece, score if _is_text(item) else _NEVER) for (piece, score), item in zip(pieces, items, strict=True)]


def _is_text(item: Any) -> bool:
    """Whether a piece stands for text, and not for a byte or something special."""
    return bool(item.type in (item.NORMAL, item.USER_DEFINED))


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, those of the pieces that were learnt first, first."""
    merges = []
    for piece in vocabulary:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _check(fast: Any, tokenizer: SentencePieceTokenizer, source: str) -> None:
    for text in _PROBES:
        ours, theirs = tokenizer.encode(text), list(fast.encode(text, add_special_tokens=False).ids)
        if ours != theirs:
            raise UsageError(
                f"{source} gives other ids for {text!r} as a fast tokenizer; give --tokenizer none, and add the"
                " tokenizer's own files"
            )
