"""The tokenizer of an export: a fast tokenizer of Hugging Face that gives every text the ids of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hyperp.data.tokenizer import HuggingFaceTokenizer, NullTokenizer, Tokenizer, load_tokenizer
from megatron_hyperp.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_CONFIG, TOKENIZER_JSON, find_tokenizer
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


def write(folder: Path, spec: str | None, *, max_length: int, prepend_bos: bool = False) -> Tokenizer | None:
    """Write the files of a tokenizer that gives a text the ids that it had in training, and return the tokenizer.

    Args:
        folder: that is there.
        spec: as in :func:`megatron_hyperp.data.tokenizer.load_tokenizer`; None for no tokenizer.
        max_length: tokens of a sequence.
        prepend_bos: whether documents began with the beginning-of-sequence token in training. Only then do the files
            name that token: evaluation harnesses put it before texts where they find it.

    Raises:
        UsageError: the tokenizer cannot be read, gives other ids as a fast tokenizer, or has no beginning-of-sequence
            token to put before texts.
    """
    if spec is None:
        return None
    tokenizer = load_tokenizer(spec)
    start = tokenizer.document_start(prepend_bos=prepend_bos)
    if isinstance(tokenizer, NullTokenizer):
        return tokenizer
    path = find_tokenizer(spec)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        splits = tokenizer.splits_special_tokens
        fast = _write_fast(folder, path.read_bytes(), tokenizer, start, spec)
    else:
        # As a text, a special token is spelled in pieces; only its id ends a document.
        splits = True
        made = to_fast(path.read_bytes(), source=spec).to_str(pretty=True).encode()
        fast = _write_fast(folder, made, tokenizer, start, spec)
        shutil.copyfile(path, folder / SENTENCEPIECE)
    eos = fast.id_to_token(tokenizer.eod)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": fast.id_to_token(*start)} if start else {}),
        "add_bos_token": prepend_bos,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": splits,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return tokenizer


def _write_fast(folder: Path, serialized: bytes, tokenizer: Tokenizer, start: list[int], source: str) -> Any:
    """Write a ``tokenizer.json``, its post-processor changed if it does not begin texts as in training.

    Returns:
        The ``tokenizers.Tokenizer`` of the file.

    Raises:
        UsageError: it gives other ids than the tokenizer of the training.
    """
    import tokenizers

    fast = tokenizers.Tokenizer.from_buffer(serialized)
    if _differing_text(fast, tokenizer, start) is not None:
        content = json.loads(serialized)
        begin = [(str(fast.id_to_token(token)), token) for token in start]
        content["post_processor"] = _post_processor(content.get("post_processor"), begin)
        serialized = json.dumps(content, indent=2, ensure_ascii=False).encode()
        fast = tokenizers.Tokenizer.from_buffer(serialized)
        text = _differing_text(fast, tokenizer, start)
        if text is not None:
            raise UsageError(
                f"{source} gives other ids for {text!r} as a fast tokenizer than it gave in training; give --tokenizer"
                " none, and add the tokenizer's own files"
            )
    (folder / TOKENIZER_JSON).write_bytes(serialized)
    return fast


def _differing_text(fast: Any, tokenizer: Tokenizer, start: list[int]) -> str | None:
    """Return a text of which a fast tokenizer gives other ids than those of a document in training; None if none is."""
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = getattr(tokenizer, "splits_special_tokens", True)
    for text in _PROBES:
        try:
            ours = start + tokenizer.encode(text)
        except UsageError:
            # A vocabulary without bytes or an unknown token spells no other text either.
            continue
        if list(fast.encode(text).ids) != ours:
            return text
    return None


def _post_processor(given: dict[str, Any] | None, begin: list[tuple[str, int]]) -> dict[str, Any] | None:
    """Return a post-processor that puts these tokens before texts, and no others before or after.

    Args:
        given: the tokenizer's own, in the form of ``tokenizer.json``; everything it does except adding tokens is kept.
        begin: text and id of a token, or nothing.
    """
    steps = _without_tokens(given)
    if begin:
        [(token, number)] = begin
        special = [{"SpecialToken": {"id": token, "type_id": kind}} for kind in (0, 1)]
        texts = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
        template = {
            "type": "TemplateProcessing",
            "single": [special[0], texts[0]],
            "pair": [special[0], texts[0], special[1], texts[1]],
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
        }
        steps.append(template)
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", "processors": steps}


def _without_tokens(given: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a post-processor that add no tokens."""
    if given is None or given["type"] in ("TemplateProcessing", "BertProcessing"):
        return []
    if given["type"] == "Sequence":
        return [step for part in given["processors"] for step in _without_tokens(part)]
    if given["type"] == "RobertaProcessing":
        # It trims offsets as ByteLevel does.
        kept = {name: given[name] for name in ("add_prefix_space", "trim_offsets")}
        return [{"type": "ByteLevel", "use_regex": True, **kept}]
    return [given]


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
