"""A SentencePiece model as a fast tokenizer: the same ids for every text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_hyperp.convert import hf_tokenizer
from megatron_hyperp.data.corpus import python_corpus_paths
from megatron_hyperp.data.tokenizer import MODEL_TYPES, load_tokenizer, train_sentencepiece
from megatron_hyperp.errors import UsageError

STRANGE = (
    *("\u2581", "a\u2581\u2581 b", "<|endoftext|>", "a<|endoftext|>b <0x41> <unk>", "\x00\x1f", "日本\U0001f680"),
    "x" * 500,
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in python_corpus_paths(max_bytes=1_500_000)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_gives_the_same_ids(tmp_path: Path, texts: list[str], model_type: str) -> None:
    from transformers import AutoTokenizer

    half = len(texts) // 2
    sample = [text[:20_000] for text in texts[:half]][:30]
    model = train_sentencepiece(sample, tmp_path / "tokenizer", vocab_size=1000, model_type=model_type)
    ours = load_tokenizer(model)
    folder = tmp_path / "hf"
    folder.mkdir()
    written = hf_tokenizer.write(folder, str(model), max_length=64)
    assert written is not None
    assert written.eod == ours.eod
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast
    assert theirs.eos_token_id == ours.eod
    tokens = 0
    # Of a unigram model, segmentations of a run of spaces have equal scores, and either library takes another.
    runs = (" " * 99,) if model_type == "bpe" else ()
    for text in (*STRANGE, *runs, *(text[:5000] for text in texts[half : half + 40])):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs(text)["input_ids"] == ids, "special tokens were added"
        assert theirs.decode(ids) == text
        tokens += len(ids)
    assert tokens > 10_000


def test_what_a_fast_tokenizer_would_do_otherwise_is_refused(tmp_path: Path, texts: list[str]) -> None:
    """SentencePiece's own defaults: NFKC, a space before texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()), model_writer=model, vocab_size=300, minloglevel=2
    )
    path = tmp_path / "default.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UsageError, match=r"default.model has normalization, .*--tokenizer none"):
        hf_tokenizer.write(tmp_path, str(path), max_length=64)
