"""ArchScale's .pth: fused and separate QKV, gate and up, experts of either kind; code objects and strangers refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.convert.archscale import ArchScaleSource
from megatron_hyperp.errors import UsageError
from tests.random_source import RandomSource, model_config
from tests.toy import EXPERTS


def archscale_state(source: RandomSource, *, fused: bool, sonic: bool) -> dict[str, torch.Tensor]:
    """Write the model as lit_gpt/model.py, attention.py and moe.py name and lay out its parts."""
    config, read = source.config, source.read
    head, groups = config.model.kv_channels, config.model.num_query_groups
    queries = config.model.num_attention_heads // groups
    state = {"transformer.wte.weight": read("embedding.word_embeddings.weight")}
    for layer in range(config.model.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
        qkv = read(f"{ours}.self_attention.linear_qkv.weight")
        if fused:
            state[f"{theirs}.attn.attn.weight"] = qkv
        else:
            rows = qkv.view(groups, queries + 2, head, -1)
            state[f"{theirs}.attn.q_proj.weight"] = rows[:, :queries].reshape(-1, qkv.shape[1])
            state[f"{theirs}.attn.k_proj.weight"] = rows[:, queries].reshape(-1, qkv.shape[1])
            state[f"{theirs}.attn.v_proj.weight"] = rows[:, queries + 1].reshape(-1, qkv.shape[1])
        state[f"{theirs}.attn.proj.weight"] = read(f"{ours}.self_attention.linear_proj.weight")
        for name in ("q", "k"):
            state[f"{theirs}.attn.{name}_norm.weight"] = read(f"{ours}.self_attention.{name}_layernorm.weight")
        state[f"{theirs}.norm_1.weight"] = read(f"{ours}.input_layernorm.weight")
        state[f"{theirs}.norm_2.weight"] = read(f"{ours}.pre_mlp_layernorm.weight")
        if not config.moe.num_experts:
            state[f"{theirs}.mlp.w1.weight"] = read(f"{ours}.mlp.linear_fc1.weight")
            state[f"{theirs}.mlp.w3.weight"] = read(f"{ours}.mlp.linear_fc2.weight")
            continue
        state |= experts(source, ours, f"{theirs}.mlp", sonic=sonic)
    state["transformer.ln_f.weight"] = read("decoder.final_layernorm.weight")
    tied = not config.model.untie_embeddings_and_output_weights
    state["lm_head.weight"] = state["transformer.wte.weight"] if tied else read("output_layer.weight")
    return state


def experts(source: RandomSource, ours: str, theirs: str, *, sonic: bool) -> dict[str, torch.Tensor]:
    local = f"{ours}.mlp.experts.local_experts"
    up = [source.read(f"{local}.{index}.linear_fc1.weight") for index in range(source.config.moe.num_experts)]
    down = [source.read(f"{local}.{index}.linear_fc2.weight") for index in range(len(up))]
    state = {
        f"{theirs}.shared_mod_in.weight": source.read(f"{ours}.mlp.shared_experts.linear_fc1.weight"),
        f"{theirs}.shared_mod_out.weight": source.read(f"{ours}.mlp.shared_experts.linear_fc2.weight"),
    }
    router = source.read(f"{ours}.mlp.router.weight")
    if sonic:
        # sonicmoe's SwiGLU takes even rows as gate and odd ones as up.
        alternating = [torch.stack(weight.chunk(2), dim=1).flatten(0, 1) for weight in up]
        both = {f"{theirs}.mods_in.weight": torch.stack(alternating), f"{theirs}.mods_out.weight": torch.stack(down)}
        return state | both | {f"{theirs}.router.weight": router}
    for index, (first, second) in enumerate(zip(up, down, strict=True)):
        state |= {f"{theirs}.mods_in.weight{index}": first, f"{theirs}.mods_out.weight{index}": second}
    return state | {f"{theirs}.router.lc_proj.weight": router}


def save(folder: Path, source: RandomSource, state: dict[str, torch.Tensor], **hparams: Any) -> tuple[Path, str]:
    path, config = folder / "iter-000010-ckpt.pth", folder / "model.yaml"
    content = {"model": state, "hparams": {"depth": 4, **hparams}, "iter_num": 40, "step_count": 10}
    torch.save(content, path)
    config.write_text(arguments.to_yaml(source.config))
    return path, str(config)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("overrides", "sonic"),
    [
        ({}, False),
        ({"untie_embeddings_and_output_weights": False, "num_query_groups": 1}, False),
        (EXPERTS, False),
        (EXPERTS, True),
    ],
    ids=["dense", "tied", "experts", "SonicMoE"],
)
def test_every_parameter_arrives(tmp_path: Path, overrides: dict[str, Any], sonic: bool, fused: bool) -> None:
    source = RandomSource(model_config(**overrides))
    state = archscale_state(source, fused=fused, sonic=sonic)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    path, config = save(tmp_path, source, compiled)
    read = ArchScaleSource(path, config)
    assert read.extras.progress == {"iteration": 10}
    assert read.config.model == source.config.model
    for name in source.parameters:
        assert torch.equal(read.read(name), source.read(name)), name


def test_norms_without_gains(tmp_path: Path) -> None:
    """Of RMSNormFunc alone: another class without gains is no RMSNorm."""
    source = RandomSource(model_config())
    state = archscale_state(source, fused=True, sonic=False)
    gains = ("norm_1.weight", "norm_2.weight", "ln_f.weight")
    bare = {name: value for name, value in state.items() if not name.endswith(gains)}
    path, config = save(tmp_path, source, bare)
    with pytest.raises(UsageError, match=r"lacks transformer.h.0.norm_1.weight"):
        ArchScaleSource(path, config)
    path, config = save(tmp_path, source, bare, norm_class="RMSNormFunc")
    read = ArchScaleSource(path, config)
    assert torch.equal(read.read("decoder.layers.2.pre_mlp_layernorm.weight"), torch.ones(64))
    name = "decoder.layers.2.self_attention.q_layernorm.weight"
    assert torch.equal(read.read(name), source.read(name))


def test_a_plain_sum_of_experts_becomes_ours(tmp_path: Path) -> None:
    """With softmax gates ArchScale adds the shared expert, without our factor sqrt(1/2)."""
    source = RandomSource(model_config(**EXPERTS, moe_gate="softmax"))
    path, config = save(tmp_path, source, archscale_state(source, fused=True, sonic=True))
    read = ArchScaleSource(path, config)
    for name in ("experts.local_experts.2.linear_fc2.weight", "shared_experts.linear_fc2.weight"):
        name = f"decoder.layers.1.mlp.{name}"
        torch.testing.assert_close(read.read(name) * math.sqrt(0.5), source.read(name))
    name = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    assert torch.equal(read.read(name), source.read(name))


class Stranger:
    """No tensor."""


def test_strangers_are_refused(tmp_path: Path) -> None:
    source = RandomSource(model_config())
    state = archscale_state(source, fused=True, sonic=False)
    path, config = save(tmp_path, source, state | {"transformer.h.0.attn.g_proj.weight": torch.ones(1)})
    with pytest.raises(UsageError, match=r"has transformer.h.0.attn.g_proj.weight, which a model of --config has not"):
        ArchScaleSource(path, config)
    with pytest.raises(UsageError, match="--from archscale needs --config"):
        ArchScaleSource(path, None)
    path, config = save(tmp_path, source, {"weight": torch.ones(1)})
    with pytest.raises(UsageError, match="has no model of ArchScale"):
        ArchScaleSource(path, config)
    path, config = save(tmp_path, source, state, stranger=Stranger())
    with pytest.raises(UsageError, match=r"holds code objects \(tests.unit.test_convert_archscale.Stranger\)"):
        ArchScaleSource(path, config)
