"""The beginning-of-sequence token: what a corpus was made with, training records and exports, tools follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.convert import huggingface
from megatron_hyperp.convert.huggingface import HuggingFaceSource
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import preflight
from tests.hugging_face import EOS, POST_PROCESSORS, TEXTS, template, write_tokenizer
from tests.random_source import RandomSource, model_config, write_random
from tests.toy import toy_config, write_corpus
from tools import convert_checkpoint, evaluate, generate, preprocess_data

TEXT = "def main(argv):\n    return 0\n"


def preprocess(folder: Path, tokenizer: Path, name: str, *flags: str) -> str:
    """Write two documents with the command-line tool and return their prefix."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT * times}) + "\n" for times in (40, 60)))
    words = ["--input", str(texts), "--tokenizer", str(tokenizer), "--output-prefix", str(folder / name)]
    preprocess_data.main([*words, "--workers", "1", *flags])
    return str(folder / name)


def documents(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [list(map(int, document)) for document in IndexedDataset(prefix)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: BOS is put before every text."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template())


def test_documents_begin_with_it_on_request(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = load_tokenizer(tokenizer).encode(TEXT * 40)
    assert documents(preprocess(tmp_path, tokenizer, "plain"))[0] == [*ids, 1]
    assert "--prepend-bos writes it" in capsys.readouterr().err
    assert documents(preprocess(tmp_path, tokenizer, "bos", "--prepend-bos"))[0] == [0, *ids, 1]
    assert "--prepend-bos" not in capsys.readouterr().err


def test_a_tokenizer_without_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--prepend-bos needs a tokenizer with .*bos_token"):
        preprocess(tmp_path, Path("null:64"), "bos", "--prepend-bos")


def test_training_records_what_its_corpora_have(tmp_path: Path, tokenizer: Path) -> None:
    plain, bos = preprocess(tmp_path, tokenizer, "plain"), preprocess(tmp_path, tokenizer, "bos", "--prepend-bos")

    def checked(*prefixes: str, prepend_bos: bool = False) -> bool:
        fields = {"data_path": list(prefixes), "tokenizer_model": str(tokenizer), "vocab_size": 512}
        config = toy_config(bos, tmp_path / "run", prepend_bos=prepend_bos, **fields)
        return preflight.check(config, 1)[0].data.prepend_bos

    assert checked(bos)
    assert checked(bos, prepend_bos=True)
    assert not checked(plain)
    with pytest.raises(UsageError, match=r"plain were preprocessed without --prepend-bos"):
        checked(plain, prepend_bos=True)
    with pytest.raises(UsageError, match=r"documents of .*bos begin with .*, those of .*plain do not"):
        checked(bos, plain)
    # A corpus of older versions, or of Megatron-LM's tools: the flag says what it has.
    for name in ("bos", "plain"):
        (tmp_path / f"{name}.settings.json").unlink()
    assert not checked(bos)
    assert checked(bos, prepend_bos=True)
    with pytest.raises(UsageError, match=r"first document of .*plain begins with token \d+, not with .* token 0"):
        checked(plain, prepend_bos=True)


@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["Llama", "Qwen3"])
@pytest.mark.parametrize("prepend_bos", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_an_export_gives_the_ids_of_the_training(
    tmp_path: Path, kind: str, prepend_bos: bool, qk_layernorm: bool
) -> None:
    from transformers import AutoTokenizer

    path = write_tokenizer(tmp_path, POST_PROCESSORS[kind])
    ours = load_tokenizer(path)
    fields = {"vocab_size": 512, "prepend_bos": prepend_bos, "qk_layernorm": qk_layernorm}
    source = RandomSource(model_config(tokenizer_model=str(path), **fields))
    folder = tmp_path / "hf"
    folder.mkdir()
    huggingface.write(folder, source, dtype=None, shard_bytes=10**9, tokenizer=str(path), advance=lambda _: None)
    theirs = AutoTokenizer.from_pretrained(folder)
    start = [0] if prepend_bos else []
    for text in TEXTS:
        assert theirs(text)["input_ids"] == start + ours.encode(text)
    assert theirs(TEXTS[0], TEXTS[1])["input_ids"] == start + ours.encode(TEXTS[0]) + start + ours.encode(TEXTS[1])
    # Evaluation harnesses begin texts with this token if there is one, and otherwise with that of the end.
    assert theirs.bos_token_id == (0 if prepend_bos else None)
    assert theirs.eos_token_id == 1
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == (0 if prepend_bos else None)
    # What a post-processor does besides is kept.
    kept = [step for step in _steps(json.loads((folder / "tokenizer.json").read_text())) if step["type"] == "ByteLevel"]
    before = [step for step in _steps({"post_processor": POST_PROCESSORS[kind]}) if step["type"] == "ByteLevel"]
    assert kept == before or kind == "roberta"
    # The way back knows it without being told.
    assert HuggingFaceSource(folder).config.data.prepend_bos == prepend_bos
    assert load_tokenizer(folder).adds_bos == prepend_bos


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    processor = content["post_processor"] or {"type": "Sequence", "processors": []}
    found: list[dict[str, Any]] = processor["processors"] if processor["type"] == "Sequence" else [processor]
    return found


def test_a_sentencepiece_model_begins_texts_as_in_training(tmp_path: Path) -> None:
    import io

    import sentencepiece
    from transformers import AutoTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([Path(__file__).read_text()]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        max_sentence_length=2**30,
        minloglevel=2,
    )
    path = tmp_path / "anything"
    path.write_bytes(model.getvalue())
    ours = load_tokenizer(path)
    assert (ours.bos, ours.eod) == (1, 2)
    for prepend_bos in (False, True):
        source = RandomSource(model_config(vocab_size=512, tokenizer_model=str(path), prepend_bos=prepend_bos))
        folder = tmp_path / f"hf{prepend_bos}"
        folder.mkdir()
        huggingface.write(folder, source, dtype=None, shard_bytes=10**9, tokenizer=str(path), advance=lambda _: None)
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert theirs(text)["input_ids"] == ([1] if prepend_bos else []) + ours.encode(text)


def test_generation_begins_as_training_did(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[int]] = []

    def record(_: Any, tokens: list[int], *__: Any, **___: Any) -> list[list[int]]:
        given.append(tokens)
        return [[]]

    monkeypatch.setattr(generate, "generate", record)
    ids = load_tokenizer(tokenizer).encode("def f")
    for name, prepend_bos in (("plain", False), ("bos", True)):
        write_random(tmp_path / name, vocab_size=512, tokenizer_model=str(tokenizer), prepend_bos=prepend_bos)
        for prompt in ("def f", ""):
            generate.main([str(tmp_path / name), "--prompt", prompt, "--max-new-tokens", "4"])
    assert given == [ids, [1], [0, *ids], [0]]
    assert "<s>" not in capsys.readouterr().out


def test_evaluation_refuses_documents_that_begin_otherwise(tmp_path: Path, tokenizer: Path) -> None:
    plain, bos = preprocess(tmp_path, tokenizer, "plain"), preprocess(tmp_path, tokenizer, "bos", "--prepend-bos")
    for prepend_bos, prefix, flag in ((True, plain, "--prepend-bos"), (False, bos, "--no-prepend-bos")):
        folder = tmp_path / str(prepend_bos)
        write_random(folder, vocab_size=512, tokenizer_model=str(tokenizer), prepend_bos=prepend_bos)
        with pytest.raises(UsageError, match=rf"documents of {prefix} .*; preprocess it again with {flag}$"):
            evaluate.main([str(folder), "--data-path", prefix])


def test_an_import_takes_the_choice_of_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model made elsewhere whose tokenizer adds BOS was trained with it; a flag overrules that."""
    folder = tmp_path / "hf"
    write = {"dtype": None, "shard_bytes": 10**9, "tokenizer": None, "advance": lambda _: None}
    folder.mkdir()
    huggingface.write(folder, RandomSource(model_config(vocab_size=512)), **write)  # type: ignore[arg-type]
    for name in ("hyperp_config.yaml", "hyperp.json"):
        (folder / name).unlink()
    write_tokenizer(folder, template(), eos_token=EOS)
    assert HuggingFaceSource(folder).config.data.prepend_bos
    words = ["--from", "hf", "--input", str(folder)]
    convert_checkpoint.main([*words, "--to", "hyperp", "--output", str(tmp_path / "ours")])
    convert_checkpoint.main(
        ["--from", "hyperp", "--to", "hf", "--input", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]
    )
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    convert_checkpoint.main([*words, "--to", "hf", "--output", str(tmp_path / "without"), "--no-prepend-bos"])
    assert not load_tokenizer(tmp_path / "without").adds_bos
    capsys.readouterr()


def test_old_configs_have_none(tmp_path: Path) -> None:
    source = write_random(tmp_path / "ours")
    assert not source.config.data.prepend_bos
    assert not preflight.check(toy_config(write_corpus(tmp_path), tmp_path / "run"), 1)[0].data.prepend_bos
