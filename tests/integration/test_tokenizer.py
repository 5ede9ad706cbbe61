"""Tokenizers: exact round trips, deterministic training, and errors for what is no tokenizer."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_hyperp.convert import hf_tokenizer
from megatron_hyperp.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, train_sentencepiece
from megatron_hyperp.errors import UsageError

SOURCE = inspect.getsource(inspect)
AWKWARD_TEXTS = [
    SOURCE,
    "",
    " ",
    "\n\n\t\tif x:\r\n\t    pass  \n",
    "trailing   ",
    "a\u2581b \u2581\u2581 c\u2581",
    "null \0 byte, bell \a",
    "naïve café 日本語 🙂 \U0010ffff e\u0301",
    f"{END_OF_DOCUMENT} <0x0A> <unk> </s>",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / request.param
    return train_sentencepiece([SOURCE], prefix, vocab_size=400, model_type=request.param)


@pytest.fixture(scope="module")
def hugging_face_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eod for token in ids)


def test_sentencepiece_gives_every_text_back(sentencepiece_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (400, 1, -1)
    check_round_trip(tokenizer, AWKWARD_TEXTS)
    assert len(tokenizer.encode(SOURCE)) < 0.6 * len(SOURCE)


def test_sentencepiece_gives_every_character_back(sentencepiece_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    check_round_trip(tokenizer, ["".join(characters[start : start + 256]) for start in range(0, len(characters), 256)])


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = SOURCE.split("\n\n")
    paths = [train_sentencepiece(iter(texts), tmp_path / name, vocab_size=350) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


@pytest.mark.parametrize(
    ("vocab_size", "model_type", "coverage", "message"),
    [
        (10, "bpe", 0.9995, "vocabulary of 10 "),
        (60000, "bpe", 0.9995, "vocabulary of 60000 .*too high"),
        (400, "word", 0.9995, "model type word"),
        (400, "bpe", 0.5, "coverage 0.5"),
    ],
)
def test_training_refuses(tmp_path: Path, vocab_size: int, model_type: str, coverage: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_sentencepiece(
            [SOURCE], tmp_path / "bad", vocab_size=vocab_size, model_type=model_type, character_coverage=coverage
        )
    assert not list(tmp_path.iterdir())


def test_training_refuses_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be trained"):
        train_sentencepiece([], tmp_path / "bad", vocab_size=400)


def test_identifiers_follow_the_content_not_the_path(sentencepiece_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_path.read_bytes())
    other = load_tokenizer(train_sentencepiece([SOURCE], tmp_path / "other", vocab_size=380))
    identifiers = load_tokenizer(sentencepiece_path).unique_identifiers
    assert load_tokenizer(copy).unique_identifiers == identifiers != other.unique_identifiers


def test_hugging_face_gives_every_text_back(hugging_face_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_path)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (400, 1, -1)
    # This library parses special tokens out of the text, by design.
    check_round_trip(tokenizer, [text for text in AWKWARD_TEXTS if END_OF_DOCUMENT not in text])


@pytest.mark.parametrize("entry", ["<pad>", {"content": "<pad>"}])
def test_hugging_face_config_names_the_end_token(hugging_face_path: Path, tmp_path: Path, entry: object) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hugging_face_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": entry}))
    assert load_tokenizer(path).eod == 0
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(path)


def test_hugging_face_without_end_token_is_refused(hugging_face_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(hugging_face_path.read_text().replace(END_OF_DOCUMENT, "<other>"))
    with pytest.raises(UsageError, match=r"tokenizer\.json has no end-of-document token"):
        load_tokenizer(path)


def test_null_tokenizer_reads_ids() -> None:
    tokenizer = load_tokenizer("null:100")
    assert (tokenizer.vocab_size, tokenizer.eod) == (100, 99)
    assert tokenizer.encode("0 5\n98") == [0, 5, 98]
    assert tokenizer.decode([0, 5, 98]) == "0 5 98"
    for text in ("100", "-1", "x", "9" * 5000):
        with pytest.raises(UsageError, match="not a token id below 100"):
            tokenizer.encode(text)


@pytest.mark.parametrize("spec", ["null:", "null:1", "null:x", "null:-5", "null:" + "9" * 5000, "/nowhere/vocab.txt"])
def test_unknown_kinds_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"null|does not exist; give a SentencePiece model"):
        load_tokenizer(spec)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B"])
def test_names_of_the_hub_are_not_looked_up(name: str) -> None:
    with pytest.raises(UsageError, match=f"nothing is downloaded .* run hf download {name} tokenizer.json"):
        load_tokenizer(name)


def test_a_folder_is_a_tokenizer(sentencepiece_path: Path, hugging_face_path: Path, tmp_path: Path) -> None:
    """As downloaded: what transformers would read of it, and its config beside it."""
    with pytest.raises(UsageError, match=r"holds neither tokenizer\.json nor tokenizer\.model; .*save_pretrained"):
        load_tokenizer(tmp_path)
    shutil.copyfile(sentencepiece_path, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).unique_identifiers == load_tokenizer(sentencepiece_path).unique_identifiers
    shutil.copyfile(hugging_face_path, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.unique_identifiers == load_tokenizer(hugging_face_path).unique_identifiers
    assert tokenizer.eod == 0


def test_content_decides_and_not_the_name(sentencepiece_path: Path, hugging_face_path: Path, tmp_path: Path) -> None:
    for source in (sentencepiece_path, hugging_face_path):
        for name in ("tokenizer", "tok.bin", "swapped.json", "swapped.model"):
            copy = tmp_path / name
            shutil.copyfile(source, copy)
            if name == "swapped.json" and source == sentencepiece_path:
                continue
            assert load_tokenizer(copy).unique_identifiers == load_tokenizer(source).unique_identifiers


@pytest.mark.parametrize("name", ["cl100k_base.tiktoken", "tokenizer.model"])
def test_tiktoken_files_are_named(tmp_path: Path, name: str) -> None:
    """Llama 3's original download has one by the name of a SentencePiece model."""
    (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UsageError, match=rf"{name} is a tiktoken file, .*tokenizer\.json with transformers"):
        load_tokenizer(tmp_path / name)


def test_an_export_splits_special_tokens_as_its_source_does(tmp_path: Path) -> None:
    """A SentencePiece model spells the text of a special token in pieces; so does the tokenizer.json made of it."""
    path = train_sentencepiece([SOURCE], tmp_path / "source", vocab_size=400)
    ours = load_tokenizer(path)
    hf_tokenizer.write(tmp_path, str(path), max_length=64)
    copies = [load_tokenizer(tmp_path), pickle.loads(pickle.dumps(load_tokenizer(tmp_path / "tokenizer.json")))]
    for text in AWKWARD_TEXTS:
        assert [copy.encode(text) for copy in copies] == [ours.encode(text)] * 2


def test_the_beginning_token_is_found(hugging_face_path: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    assert (load_tokenizer(sentencepiece_path).bos, load_tokenizer(hugging_face_path).bos) == (-1, -1)
    shutil.copyfile(hugging_face_path, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<pad>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.adds_bos) == (0, False)
    assert tokenizer.document_start(prepend_bos=True) == [0]
    assert tokenizer.document_start(prepend_bos=False) == []


@pytest.mark.parametrize("name", ["absent.model", "absent.json"])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be read"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not a tokenizer\n", b'{"a": 1}', bytes(range(256)) * 8])
@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
def test_foreign_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} is not"):
        load_tokenizer(path)


def test_truncated_file_is_refused(sentencepiece_path: Path, hugging_face_path: Path, tmp_path: Path) -> None:
    for source in (sentencepiece_path, hugging_face_path):
        whole = source.read_bytes()
        path = tmp_path / source.name
        for length in (1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(UsageError, match=path.name):
                load_tokenizer(path)
