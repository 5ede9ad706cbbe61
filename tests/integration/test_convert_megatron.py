"""Megatron-LM's checkpoints: the same logits from a stock GPT of Megatron-Core, every bit back, refusals by name."""

from __future__ import annotations

import argparse
import enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.convert import megatron_lm, state
from megatron_hyperp.convert.megatron_arguments import flags, from_arguments, to_arguments
from megatron_hyperp.convert.megatron_lm import MegatronSource
from megatron_hyperp.convert.verify import compare
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.inference import model_on_one_rank
from tests import tolerances
from tests.random_source import RandomSource, model_config
from tests.toy import EXPERTS, VOCABULARY, one_rank

TOKENS = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, tied, 1 group, no QK norm": {
        "untie_embeddings_and_output_weights": False,
        "num_query_groups": 1,
        "qk_layernorm": False,
    },
    "dense, muP": {"optimizer": "adamw", "base_hidden_size": 32},
    "experts, softmax, shared": {**EXPERTS, "moe_gate": "softmax"},
}


def export(folder: Path, source: RandomSource, **overrides: Any) -> Path:
    folder.mkdir()
    options = {"layout": Layout(tp=2, pp=2), "dtype": None, "advance": lambda _: None, **overrides}
    megatron_lm.write(folder, source, **options)
    return folder


def stock_logits(folder: Path, given: argparse.Namespace) -> torch.Tensor:
    """Load the checkpoint into Megatron-Core's own GPT, built from the arguments, as Megatron-LM does."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = {
        "num_moe_experts": given.num_experts,
        "moe_router_topk": given.moe_router_topk,
        "moe_ffn_hidden_size": given.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": given.moe_shared_expert_intermediate_size,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    core = TransformerConfig(
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        ffn_hidden_size=given.ffn_hidden_size,
        num_attention_heads=given.num_attention_heads,
        num_query_groups=given.num_query_groups,
        kv_channels=given.kv_channels,
        qk_layernorm=given.qk_layernorm,
        normalization=given.normalization,
        layernorm_epsilon=given.norm_epsilon,
        gated_linear_unit=given.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=given.add_bias_linear,
        hidden_dropout=given.hidden_dropout,
        attention_dropout=given.attention_dropout,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(experts if given.num_experts else {}),
        **device.megatron_settings(),
    )
    spec = get_gpt_layer_local_spec(given.num_experts, False, given.qk_layernorm, normalization=given.normalization)
    model = GPTModel(
        core,
        spec,
        vocab_size=given.padded_vocab_size,
        max_sequence_length=given.seq_length,
        position_embedding_type=given.position_embedding_type,
        rotary_base=given.rotary_base,
        share_embeddings_and_output_weights=not given.untie_embeddings_and_output_weights,
    )
    # Megatron-LM too allows its namespace when it starts.
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(folder / megatron_lm.RELEASE), strict="log_all"
        )
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") or "output_layer" in name for name in missing)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    mask = torch.ones(1, 1, TOKENS.shape[1], TOKENS.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model.eval()(TOKENS, positions, mask)
    parallel_state.destroy_model_parallel()
    return logits


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_a_stock_gpt_gives_the_same_logits(tmp_path: Path, overrides: dict[str, Any]) -> None:
    source = RandomSource(model_config(**overrides))
    folder = export(tmp_path / "out", source)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    back = MegatronSource(folder)
    assert back.config == source.config
    assert back.extras.progress == source.extras.progress
    assert compare(source, back, advance=lambda _: None).endswith("agree bit for bit")
    with model_on_one_rank(source.config, source.read) as logits:
        ours = logits(TOKENS)
    with one_rank():
        assert dist.get_world_size() == 1
        theirs = stock_logits(folder, back.reader.common["args"])
    assert float(ours.abs().max()) > 0.5
    assert float((ours - theirs).abs().max()) < tolerances.EXPORTED_LOGITS


@pytest.mark.parametrize("overrides", [MODELS["dense"], MODELS["experts, softmax, shared"]], ids=["dense", "experts"])
def test_a_model_of_megatron_lm_goes_on_here(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Without anything of ours beside it, its arguments are its config, and the model computes the same."""
    source = RandomSource(model_config(**overrides))
    folder = export(tmp_path / "out", source)
    for name in (state.CONFIG, state.STATE, f"{state.UNDO}.safetensors"):
        (folder / megatron_lm.RELEASE / name).unlink()
    plain = MegatronSource(folder)
    assert plain.config.model.residual_multiplier == 1.0
    assert plain.config.model.softmax_scale == 0.25
    with model_on_one_rank(source.config, source.read) as logits:
        ours = logits(TOKENS)
    with model_on_one_rank(plain.config, plain.read) as logits:
        assert float((logits(TOKENS) - ours).abs().max()) < tolerances.EXPORTED_LOGITS


def test_what_a_gpt_of_megatron_lm_lacks_is_refused() -> None:
    megatron_lm.check(model_config())
    with pytest.raises(UsageError, match="--moe-gate sqrt is nothing that a GPT of Megatron-LM has"):
        megatron_lm.check(model_config(**EXPERTS))
    with pytest.raises(UsageError, match="one expert a token"):
        megatron_lm.check(model_config(**EXPERTS | {"moe_router_topk": 1, "moe_gate": "softmax"}))


def test_arguments_that_cannot_be_expressed_are_named() -> None:
    given = vars(to_arguments(model_config(), Layout(), torch.float32))
    assert from_arguments(given, "it").model.num_query_groups == 2
    # --norm-epsilon is layernorm_epsilon there, and was norm_epsilon before Megatron-Core 0.16.
    assert from_arguments(given | {"layernorm_epsilon": 1e-6}, "it").model.norm_epsilon == 1e-6
    given.pop("layernorm_epsilon")
    assert from_arguments(given | {"norm_epsilon": 1e-6}, "it").model.norm_epsilon == 1e-6
    # What is 0 there is not replaced by a default; the converter then refuses it.
    assert from_arguments(given | {"norm_epsilon": 0.0}, "it").model.norm_epsilon == 0
    assert from_arguments(given | {"norm_epsilon": None}, "it").model.norm_epsilon == 1e-5
    for change, words in (
        ({"position_embedding_type": "learned_absolute"}, "has position_embedding_type 'learned_absolute'"),
        ({"normalization": "LayerNorm"}, "has normalization 'LayerNorm'"),
        ({"swiglu": False}, "has swiglu False"),
        ({"add_qkv_bias": True}, "has add_qkv_bias True"),
        ({"rotary_percent": 0.5}, "has rotary_percent 0.5"),
        ({"moe_router_score_function": "sigmoid"}, "has moe_router_score_function 'sigmoid'"),
        ({"layernorm_zero_centered_gamma": True}, "has layernorm_zero_centered_gamma True"),
        ({"rope_type": "yarn"}, "has rope_type 'yarn'"),
        ({"use_mup": True}, "has use_mup True"),
        ({"moe_router_topk_scaling_factor": 2.5}, "has moe_router_topk_scaling_factor 2.5"),
        ({"num_layers": None}, "lacks an argument that a model needs"),
    ):
        with pytest.raises(UsageError, match=words):
            from_arguments(given | change, "it")


def test_flags_name_what_megatron_lm_does_not_take_from_a_checkpoint() -> None:
    assert "--qk-layernorm" in flags(model_config())
    plain = flags(model_config(qk_layernorm=False))
    assert not [word for word in ("--qk-layernorm", "--norm-epsilon", "--moe") if word in plain]
    experts = {**EXPERTS, "moe_gate": "softmax", "norm_epsilon": 1e-6, "moe_expert_capacity_factor": 1.5}
    assert flags(model_config(**experts)).endswith(
        " --qk-layernorm --norm-epsilon 1e-06 --moe-router-dtype fp32 --moe-expert-capacity-factor 1.5"
    )
    given = vars(to_arguments(model_config(**experts), Layout(), torch.float32))
    assert from_arguments(given, "it").moe.moe_expert_capacity_factor == 1.5


def test_weights_that_no_model_here_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path / "out", RandomSource(model_config()))
    reader = MegatronSource(folder).reader
    gate = "decoder.layers.self_attention.linear_gate.weight"
    reader.tensors[gate] = reader.tensors["decoder.layers.self_attention.linear_proj.weight"]
    monkeypatch.setattr(megatron_lm, "CheckpointReader", lambda *_, **__: reader)
    with pytest.raises(UsageError, match=f"has {gate}, which no model here has: it cannot be imported"):
        MegatronSource(folder)


class Foreign(enum.Enum):
    THING = 1


def test_code_objects_in_the_arguments(tmp_path: Path) -> None:
    """Megatron's own enumerations are read; other classes are refused by name."""
    from megatron.core.transformer.enums import AttnBackend

    folder = export(tmp_path / "out", RandomSource(model_config()))
    path = folder / megatron_lm.RELEASE / "common.pt"
    common = MegatronSource(folder).reader.common
    common["args"].attention_backend = AttnBackend.auto
    torch.save(common, path)
    assert MegatronSource(folder).reader.common["args"].attention_backend is AttnBackend.auto
    common["args"].thing = Foreign.THING
    torch.save(common, path)
    with pytest.raises(UsageError, match=r"holds code objects \(tests.integration.test_convert_megatron.Foreign\)"):
        MegatronSource(folder)


def test_enumerations_of_a_newer_version_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core 0.19 writes InferenceCudaGraphScope among its arguments, which 0.16 does not have."""
    from megatron.core.transformer import enums

    folder = export(tmp_path / "there", RandomSource(model_config()))
    path, name = folder / megatron_lm.RELEASE / "common.pt", "InferenceCudaGraphScope"
    common = MegatronSource(folder).reader.common
    newer = enum.Enum(name, {"none": 1}, module=enums.__name__)
    with monkeypatch.context() as patch:
        patch.setattr(enums, name, newer, raising=False)
        common["args"].inference_cuda_graph_scope = newer(1)
        torch.save(common, path)
    with monkeypatch.context() as patch:
        patch.delattr(enums, name, raising=False)
        assert MegatronSource(folder).reader.common["args"].inference_cuda_graph_scope.value == 1
