"""A small Hugging Face tokenizer with the post-processor and the gaps that a test asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOS, EOS = "<s>", "</s>"
TEXTS = ("def main(argv):\n    return 0\n", "  two  spaces", "Zürich 東京", "a</s>b <s>", "", " ")
_BEGIN, _END = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (BOS, EOS)]
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*, end: bool = False) -> dict[str, Any]:
    """A post-processor that puts BOS before a text, and EOS after it if asked to."""
    single = [_BEGIN, {"Sequence": {"id": "A", "type_id": 0}}, *([_END] if end else [])]
    tokens = {token: {"id": token, "ids": [number], "tokens": [token]} for number, token in enumerate((BOS, EOS))}
    pair = [*single, _BEGIN, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


# Post-processors as published models have them (Llama 3, Llama 2, BERT-like ones, RoBERTa, GPT-2).
POST_PROCESSORS: dict[str, dict[str, Any] | None] = {
    "template after bytes": {"type": "Sequence", "processors": [_BYTES, template()]},
    "template": template(),
    "template with an end": template(end=True),
    "roberta": {
        "type": "RobertaProcessing",
        "sep": [EOS, 1],
        "cls": [BOS, 0],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
    "bytes alone": _BYTES,
    "none": None,
}


def write_tokenizer(
    folder: Path, post_processor: dict[str, Any] | None, *, vocab_size: int = 400, gap: int = 0, **config: Any
) -> Path:
    """Write a ``tokenizer.json`` of bytes and some merges, BOS 0 and EOS 1, and a ``tokenizer_config.json``.

    Args:
        folder: that is there.
        post_processor: of the tokenizer.
        vocab_size: tokens.
        gap: ids that stand for nothing before a last token ``<tool>``; 0: there is no such token.
        config: further fields of ``tokenizer_config.json``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = post_processor
    if gap:
        number = tokenizer.get_vocab_size() + gap
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": number, "content": "<tool>", "special": True, **flags})
        # An added token that the model does not have gets the next free id, whatever the file says.
        content["model"]["vocab"]["<tool>"] = number
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS, **config}))
    return path
