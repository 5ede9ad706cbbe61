"""Exports to Hugging Face: the same logits in transformers, every bit back; imports refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.convert import hf_config, huggingface, state
from megatron_hyperp.convert.convert import Job, convert
from megatron_hyperp.convert.huggingface import HuggingFaceSource
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.verify import compare, logits_of_transformers
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.inference import model_on_one_rank
from tests import tolerances
from tests.random_source import RandomSource, model_config, write_random
from tests.toy import EXPERTS, VOCABULARY

TOKENS = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
TIED = {"untie_embeddings_and_output_weights": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense, 1 group": {"num_query_groups": 1},
    "dense, 2 groups, tied": {"num_query_groups": 2, **TIED},
    "dense, 4 groups": {"num_query_groups": 4},
    "dense, no QK norm": {"qk_layernorm": False},
    "dense, muP": {"optimizer": "adamw", "base_hidden_size": 32},
    "experts, 1 group, tied": {**EXPERTS, "num_query_groups": 1, **TIED},
    "experts, 2 groups": {**EXPERTS, "num_query_groups": 2},
    "experts, softmax, no shared one, no QK norm": {
        **EXPERTS,
        "moe_shared_expert_intermediate_size": 0,
        "moe_gate": "softmax",
        "qk_layernorm": False,
    },
}


def job(**fields: Any) -> Job:
    default: dict[str, Any] = {
        "layout": Layout(),
        "dtype": None,
        "shard_bytes": None,
        "tokenizer": None,
        "radius": "stateless",
        "average": None,
        "weights_only": False,
        "verify": False,
    }
    places = {name: str(fields.pop(name)) for name in ("input", "output")}
    return Job(**(default | fields | places))


def export(folder: Path, source: RandomSource, *, dtype: torch.dtype | None = None) -> Path:
    folder.mkdir()
    huggingface.write(folder, source, dtype=dtype, shard_bytes=10**6, tokenizer="null:64", advance=lambda _: None)
    return folder


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_transformers_gives_the_same_logits(tmp_path: Path, overrides: dict[str, Any]) -> None:
    source = RandomSource(model_config(**overrides))
    folder = export(tmp_path / "hf", source)
    theirs = logits_of_transformers(folder, TOKENS)
    with model_on_one_rank(source.config, source.read) as logits:
        ours = logits(TOKENS)
    assert float(ours.abs().max()) > 0.5
    assert float((ours - theirs).abs().max()) < tolerances.EXPORTED_LOGITS
    back = HuggingFaceSource(folder)
    assert back.config == source.config
    assert back.extras.progress == source.extras.progress
    assert compare(source, back, advance=lambda _: None).endswith("agree bit for bit")


def test_our_class_is_found_through_auto_classes(tmp_path: Path) -> None:
    """As users load it: the code comes from the folder. Greedy generation with and without a cache agrees."""
    from transformers import AutoModelForCausalLM

    folder = export(tmp_path / "hf", RandomSource(model_config(**EXPERTS)))
    assert (folder / hf_config.CODE_FILE).is_file()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.__class__.__module__.startswith("transformers_modules.")
    assert torch.equal(model(TOKENS).logits, logits_of_transformers(folder, TOKENS))
    runs = [
        model.generate(TOKENS[:1, :8], max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_rounded_weights_come_back_in_their_own_dtype(tmp_path: Path) -> None:
    """A model in bf16 folds to the bit too; one in fp32 that is written in bf16 does not, and says so."""
    bf16 = RandomSource(model_config(), torch.bfloat16)
    back = HuggingFaceSource(export(tmp_path / "same", bf16))
    assert compare(bf16, back, advance=lambda _: None).endswith("agree bit for bit")
    source = RandomSource(model_config())
    rounded = HuggingFaceSource(export(tmp_path / "rounded", source, dtype=torch.bfloat16))
    assert not (tmp_path / "rounded" / f"{state.UNDO}.safetensors").is_file()
    assert compare(source, rounded, advance=lambda _: None).endswith("agree up to rounding")


def test_there_and_back_with_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_random(tmp_path / "ours", layout=Layout(tp=2, pp=2))
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf", verify=True))
    convert(
        job(
            source="hf",
            target="hyperp",
            input=tmp_path / "hf",
            output=tmp_path / "back",
            verify=True,
            layout=Layout(tp=2),
        )
    )
    output = capsys.readouterr().out
    assert output.count("35 tensors agree bit for bit") == 2
    assert output.count("logits agree with those of transformers within") == 2
    back = HyperPSource(tmp_path / "back")
    assert back.config == source.config
    assert back.reader.common["weights_only"] is True
    for name in source.parameters:
        assert torch.equal(back.read(name), source.read(name))


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "ours")
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf"), dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert "as Qwen3ForCausalLM" in capsys.readouterr().out


def test_a_plain_qwen_and_llama_are_imported(tmp_path: Path) -> None:
    """Made by transformers itself, without anything of ours beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    for kind, settings in ((Qwen3ForCausalLM, Qwen3Config), (LlamaForCausalLM, LlamaConfig)):
        torch.manual_seed(0)
        folder = tmp_path / kind.__name__
        kind(settings(**sizes, tie_word_embeddings=kind is Qwen3ForCausalLM)).save_pretrained(folder)
        source = HuggingFaceSource(folder)
        model = source.config.model
        assert (model.residual_multiplier, model.rotary_base, model.kv_channels) == (1.0, 50000, 32)
        assert model.qk_layernorm == (kind is Qwen3ForCausalLM)
        theirs = logits_of_transformers(folder, TOKENS)
        with model_on_one_rank(source.config, source.read) as logits:
            assert float((logits(TOKENS) - theirs).abs().max()) < tolerances.EXPORTED_LOGITS


def test_what_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", RandomSource(model_config()))
    for name in (state.CONFIG, state.STATE):
        (folder / name).unlink()
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for change, words in (
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel'; those that are read: Qwen3",
        ),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"use_sliding_window": True}, "has use_sliding_window True"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "of the type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config"),
        ({"num_hidden_layers": 5}, "lacks the tensor model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "has model.layers.3.* that a model here has not"),
        ({"intermediate_size": 64}, "of shape"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UsageError, match=words) as caught:
            HuggingFaceSource(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_absent_keys_are_what_transformers_takes_them_for(name: str) -> None:
    import transformers

    kind = getattr(transformers, f"{name}Config")
    for given in (
        {},
        {"hidden_size": 64, "num_attention_heads": 4},
        {"num_attention_heads": 64, "num_key_value_heads": 8},
        {"hidden_act": "swish", "tie_word_embeddings": True},
    ):
        theirs = kind(**given)
        ours = hf_config.from_json({"architectures": [f"{name}ForCausalLM"], **given}, "here").model
        activation = transformers.activations.ACT2FN[theirs.hidden_act]
        assert torch.equal(activation(torch.arange(-9.0, 9.0)), torch.nn.functional.silu(torch.arange(-9.0, 9.0)))
        found = {
            "vocab_size": ours.vocab_size,
            "hidden_size": ours.hidden_size,
            "intermediate_size": ours.ffn_hidden_size,
            "num_hidden_layers": ours.num_layers,
            "num_attention_heads": ours.num_attention_heads,
            "num_key_value_heads": ours.num_query_groups,
            "head_dim": ours.kv_channels,
            "rms_norm_eps": ours.norm_epsilon,
            "max_position_embeddings": ours.max_position_embeddings,
            "tie_word_embeddings": not ours.untie_embeddings_and_output_weights,
            "rope_parameters": {"rope_type": "default", "rope_theta": ours.rotary_base},
            "attention_bias": False,
        }
        assert found == {key: getattr(theirs, key) for key in found}


def test_positions_and_rotary_base_are_carried(tmp_path: Path) -> None:
    """Of an imported model, whose training here may take shorter sequences."""
    model = model_config(rotary_base=50000, max_position_embeddings=8192)
    folder = export(tmp_path / "hf", RandomSource(model))
    content = json.loads((folder / "config.json").read_text())
    assert content["max_position_embeddings"] == 8192
    # The first for transformers 4, the second for 5.
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 50000
    for file in (state.CONFIG, state.STATE):
        (folder / file).unlink()
    imported = HuggingFaceSource(folder).config
    assert (imported.model.seq_length, imported.model.max_position_embeddings) == (4096, 8192)
    assert hf_config.to_json(imported, dtype="float32", bos=None, eos=None)["max_position_embeddings"] == 8192
    assert hf_config.to_json(model_config(), dtype="float32", bos=None, eos=None)["max_position_embeddings"] == 64


def test_radii_are_those_of_the_weights(tmp_path: Path) -> None:
    source = write_random(tmp_path / "ours")
    convert(job(source="hyperp", target="hf", input=tmp_path / "ours", output=tmp_path / "hf"))
    convert(job(source="hf", target="hyperp", input=tmp_path / "hf", output=tmp_path / "back", radius="from-weights"))
    back = HyperPSource(tmp_path / "back")
    assert back.config.optimizer.radius == "from-weights"
    radii = back.extras.radii
    assert radii is not None
    assert len(radii) == 4 * 4 + 1
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    assert radii[name] == pytest.approx(float(source.read(name).norm()), rel=1e-6)
