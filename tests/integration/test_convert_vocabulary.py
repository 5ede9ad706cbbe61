"""Padding of the vocabulary: never sampled, cut from exports and back to the bit, added to imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.convert.averaging import AverageSource
from megatron_hyperp.convert.convert import convert
from megatron_hyperp.convert.huggingface import HuggingFaceSource, load_transformers
from megatron_hyperp.convert.hyperp import HyperPSource, write_weights
from megatron_hyperp.convert.megatron_lm import MegatronSource
from megatron_hyperp.convert.verify import compare, logits_of_transformers
from megatron_hyperp.convert.vocabulary import VOCABULARY_WEIGHTS
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.inference import model_on_one_rank
from tests import tolerances
from tests.hugging_face import write_tokenizer
from tests.integration.test_convert_huggingface import TIED, job
from tests.random_source import RandomSource, model_config, write_random
from tests.toy import EXPERTS
from tools import generate

# Of the 64 rows of the toy model.
KNOWN = 50
TOKENS = torch.randint(KNOWN, (2, 48), generator=torch.Generator().manual_seed(1))
PADDED = {"tokenizer_model": f"null:{KNOWN}", "unpadded_vocab_size": KNOWN}


def written(folder: Path, **overrides: Any) -> RandomSource:
    return write_random(folder, **{**PADDED, **overrides})


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        pytest.param({}, torch.float32, id="dense, fp32"),
        pytest.param(TIED, torch.bfloat16, id="tied, bf16"),
        pytest.param(EXPERTS, torch.float32, id="experts, fp32"),
        pytest.param({}, torch.bfloat16, id="dense, bf16", marks=pytest.mark.matrix),
        pytest.param(TIED, torch.float32, id="tied, fp32", marks=pytest.mark.matrix),
        pytest.param(EXPERTS, torch.bfloat16, id="experts, bf16", marks=pytest.mark.matrix),
    ],
)
def test_an_export_has_the_tokens_alone_and_comes_back_whole(
    tmp_path: Path, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    source = RandomSource(model_config(**PADDED, **overrides), dtype)
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", source, layout=Layout(tp=2), dtype=None, advance=lambda _: None)
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf", verify=True))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == KNOWN
    model = load_transformers(tmp_path / "hf", torch.float32)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (KNOWN, 64)
    back = HuggingFaceSource(tmp_path / "hf")
    assert back.config == source.config
    assert compare(source, back, advance=lambda _: None).endswith("agree bit for bit")
    convert(job(source="hf", target="hyperp", input=tmp_path / "hf", output=tmp_path / "back", layout=Layout(tp=2)))
    assert compare(source, HyperPSource(tmp_path / "back"), advance=lambda _: None).endswith("agree bit for bit")


def test_the_logits_of_the_tokens_stay(tmp_path: Path) -> None:
    source = written(tmp_path / "ours")
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf"))
    theirs = logits_of_transformers(tmp_path / "hf", TOKENS)
    with model_on_one_rank(source.config, source.read) as logits:
        ours = logits(TOKENS)
    assert theirs.shape[-1] == KNOWN
    assert float((ours[..., :KNOWN] - theirs).abs().max()) < tolerances.EXPORTED_LOGITS


def test_a_lost_padding_is_named(tmp_path: Path) -> None:
    written(tmp_path / "ours")
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf"))
    (tmp_path / "hf" / "hyperp_padding.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no hyperp_padding\.safetensors"):
        HuggingFaceSource(tmp_path / "hf")


def test_padding_is_kept_on_request_and_never_sampled_there(tmp_path: Path) -> None:
    source = written(tmp_path / "ours")
    fields = {"source": "hyperp", "target": "hf", "input": tmp_path / "ours", "output": tmp_path / "hf"}
    convert(job(**fields, keep_padding=True, verify=True))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 64
    assert not (tmp_path / "hf" / "hyperp_padding.safetensors").is_file()
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(KNOWN, 64))
    assert compare(source, HuggingFaceSource(tmp_path / "hf"), advance=lambda _: None).endswith("agree bit for bit")
    with pytest.raises(UsageError, match="--keep-padding needs --to hf"):
        convert(job(source="hyperp", target="hyperp", input="a", output="b", keep_padding=True))


def test_a_checkpoint_of_an_older_version_is_cut_by_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "ours", unpadded_vocab_size=None)
    fields = {"source": "hyperp", "target": "hf", "input": tmp_path / "ours"}
    convert(job(**fields, output=tmp_path / "cut"))
    convert(job(**fields, output=tmp_path / "whole", tokenizer="none"))
    assert "does not record its vocabulary before padding" in capsys.readouterr().out
    sizes = {name: json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] for name in ("cut", "whole")}
    assert sizes == {"cut": KNOWN, "whole": 64}
    with pytest.raises(UsageError, match="the tokenizer knows 65 tokens, and the model has an embedding of 64 rows"):
        convert(job(**fields, output=tmp_path / "no", tokenizer="null:65"))


class Favouring(RandomSource):
    """A model whose likeliest next ids, by far, are those of padding."""

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if name == "output_layer.weight":
            tensor[KNOWN:] *= 100
        return tensor


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--temperature", "1"],
        ["--temperature", "1", "--top-k", "3"],
        ["--temperature", "1", "--top-p", "0.9"],
    ],
    ids=["greedy", "sampled", "top k", "top p"],
)
def test_padding_is_never_sampled(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    source = Favouring(model_config(**PADDED))
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", source, layout=Layout(), dtype=None, advance=lambda _: None)
    generate.main([str(tmp_path / "ours"), "--prompt", "5 9 2", "--max-new-tokens", "30", *flags])
    made = [int(word) for word in capsys.readouterr().out.split()][3:]
    assert len(made) > 3
    assert max(made) < KNOWN


def test_gaps_in_a_vocabulary_are_never_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Added tokens may have ids far above the others; between them there is nothing."""
    path = write_tokenizer(tmp_path, None, vocab_size=300, gap=20)
    tokenizer = load_tokenizer(path)
    rows, last = 384, tokenizer.vocab_size - 1
    gap = range(last - 20, last)
    assert tokenizer.knows(last)
    assert not any(map(tokenizer.knows, [-1, *gap, last + 1]))
    source = write_random(tmp_path / "ours", vocab_size=rows, tokenizer_model=str(path))
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf"))
    config, generation = (
        json.loads((tmp_path / "hf" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert config["vocab_size"] == last + 1
    assert generation["suppress_tokens"] == list(gap)
    assert source.config.model.vocab_size == rows
    generate.main([str(tmp_path / "ours"), "--temperature", "3", "--samples", "4", "--max-new-tokens", "60"])
    assert capsys.readouterr().out.count("---") == 3


def test_an_unknown_id_is_one_line(tmp_path: Path) -> None:
    model = train_sentencepiece([Path(__file__).read_text()], tmp_path / "sentencepiece", vocab_size=350)
    fast = write_tokenizer(tmp_path, None, vocab_size=300, gap=20)
    for spec, unknown in ((model, 350), (model, -1), (fast, 310), (fast, 10**6), ("null:50", 50), ("null:50", -1)):
        with pytest.raises(UsageError, match=rf"^token id {unknown} is not in the tokenizer's vocabulary of \d+"):
            load_tokenizer(spec).decode([3, unknown])


def test_an_import_is_padded_for_ranks_that_do_not_divide_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(**sizes, vocab_size=KNOWN, num_attention_heads=4, num_key_value_heads=4)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    there = {"source": "hf", "target": "hyperp", "input": tmp_path / "hf"}
    convert(job(**there, output=tmp_path / "ours", layout=Layout(tp=4), verify=True, radius="from-weights"))
    output = capsys.readouterr().out
    assert "the vocabulary of 50 is padded with zeros to 512 for TP 4" in output
    assert "logits agree with those of transformers" in output
    ours, original = HyperPSource(tmp_path / "ours"), HuggingFaceSource(tmp_path / "hf")
    assert (ours.config.model.vocab_size, ours.config.model.unpadded_vocab_size) == (512, KNOWN)
    for name in VOCABULARY_WEIGHTS:
        assert torch.equal(ours.read(name)[:KNOWN], original.read(name))
        assert not ours.read(name)[KNOWN:].any()
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "back", verify=True))
    mine, theirs = (load_transformers(tmp_path / name, torch.float32).state_dict() for name in ("back", "hf"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # Ranks that divide it leave it alone.
    convert(job(**there, output=tmp_path / "two", layout=Layout(tp=2)))
    assert HyperPSource(tmp_path / "two").config.model.vocab_size == KNOWN


def test_an_export_to_megatron_lm_is_padded_and_comes_back(tmp_path: Path) -> None:
    source = write_random(tmp_path / "ours", vocab_size=KNOWN, num_query_groups=4, tokenizer_model=f"null:{KNOWN}")
    there = {"source": "hyperp", "target": "megatron-lm", "input": tmp_path / "ours", "layout": Layout(tp=4)}
    convert(job(**there, output=tmp_path / "theirs", verify=True))
    back = MegatronSource(tmp_path / "theirs")
    assert back.reader.common["args"].padded_vocab_size == 512
    assert back.reader.shape(back._slab(VOCABULARY_WEIGHTS[0])) == (512, 64)
    assert back.config == source.config
    assert compare(source, back, advance=lambda _: None).endswith("agree bit for bit")
    # Our own checkpoint cannot be padded: the radius of its output layer follows from its rows.
    with pytest.raises(UsageError, match="--tp 4 does not divide the rows of the embedding, 50"):
        convert(job(**there | {"target": "hyperp"}, output=tmp_path / "no"))


def test_an_average_is_cut_too(tmp_path: Path) -> None:
    """Also of one run that an older version began, which did not record the vocabulary before padding."""
    root = tmp_path / "ours"
    source = written(root, unpadded_vocab_size=None)
    (root / "iter_0000000").rename(root / "iter_0000001")
    config = root / "iter_0000001" / "config.yaml"
    other = tmp_path / "newer"
    written(other)
    (other / "iter_0000000").rename(root / "iter_0000002")
    assert "unpadded_vocab_size: null" in config.read_text()
    (root / "latest_checkpointed_iteration.txt").write_text("2\n")
    convert(job(source="hyperp", target="hf", input=root, output=tmp_path / "hf", average=2, verify=True))
    back = HuggingFaceSource(tmp_path / "hf")
    assert back._rows == KNOWN
    assert len(back.read(VOCABULARY_WEIGHTS[0])) == 64
    mean = AverageSource([HyperPSource(root / f"iter_000000{number}") for number in (1, 2)])
    assert torch.equal(back.read(VOCABULARY_WEIGHTS[0]), mean.read(VOCABULARY_WEIGHTS[0]))
    assert source.config.model.vocab_size == 64
