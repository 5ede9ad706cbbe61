"""Multipliers folded into weights and out again, fused weights cut, safetensors written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_hyperp.convert.folding import fold_, unfold_
from megatron_hyperp.convert.huggingface import name_map
from megatron_hyperp.convert.source import slab_of
from megatron_hyperp.convert.tensor_files import INDEX, Spec, TensorReader, TensorWriter
from megatron_hyperp.errors import UsageError
from tests.random_source import RandomSource, model_config
from tests.toy import EXPERTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1 / math.sqrt(8), math.sqrt(8), 1 / math.sqrt(48), 0.1, 0.5])
def test_folding_is_undone_to_the_bit(dtype: torch.dtype, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(300, 400, generator=generator).to(dtype)
    weights[0, :6] = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 6e-8, 3.0]).to(dtype)
    folded = weights.clone()
    corrections = fold_(folded, factor, undo=True)
    assert torch.equal(folded, (weights.float() * factor).to(dtype))
    assert factor == 0.5 or not torch.equal(folded / factor, weights), (
        "division alone would do, and this test show nothing"
    )
    unfold_(folded, factor, corrections)
    assert torch.equal(folded.view(torch.uint8), weights.contiguous().view(torch.uint8))


def test_without_corrections_nothing_but_rounding_is_lost() -> None:
    weights = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    folded = weights.clone()
    assert fold_(folded, 0.3, undo=False) is None
    unfold_(folded, 0.3)
    torch.testing.assert_close(folded, weights, rtol=3e-7, atol=0)


def test_an_overflow_is_refused() -> None:
    with pytest.raises(UsageError, match=r"o_proj holds numbers that overflow"):
        fold_(torch.tensor([1.0, 3e38]), 3.0, undo=True, name="o_proj")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_weights_are_cut_by_global_heads(groups: int) -> None:
    config = model_config(num_query_groups=groups)
    names, head, queries = name_map(config), config.model.kv_channels, 4 // groups
    source = RandomSource(config)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    fused = source.read(name)
    q, k, v = names.split(fused, 3)
    assert [piece.shape for piece in names.pieces(name, fused.shape)] == [tuple(part.shape) for part in (q, k, v)]
    rows = (queries + 2) * head
    for group in range(groups):
        start = group * rows
        mine = q[group * queries * head : (group + 1) * queries * head]
        assert torch.equal(mine, fused[start : start + queries * head])
        assert torch.equal(k[group * head : (group + 1) * head], fused[start + queries * head : start + rows - head])
        assert torch.equal(v[group * head : (group + 1) * head], fused[start + rows - head : start + rows])
    assert torch.equal(names.merge([q, k, v]), fused)


def test_every_parameter_has_one_place_elsewhere() -> None:
    for overrides in ({}, EXPERTS, {"untie_embeddings_and_output_weights": False, "qk_layernorm": False}):
        source = RandomSource(model_config(**overrides))
        names = name_map(source.config)
        found = [piece.name for name, s in source.parameters.items() for piece in names.pieces(name, s.shape)]
        assert len(found) == len(set(found))
        slabs = [slab_of(name) for name in source.parameters]
        assert len(slabs) == len(set(slabs))
    assert str(slab_of("decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight")) == (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight[3][1]"
    )
    assert str(slab_of("decoder.layers.0.input_layernorm.weight")) == (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight[0]"
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(10, 10, generator=generator),
        "b": torch.randn(30, generator=generator).bfloat16(),
        "c": torch.randint(-128, 127, (7,), dtype=torch.int8, generator=generator),
        "d": torch.randn(5, 3, generator=generator).half(),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int | None) -> None:
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with TensorWriter(folder, specs, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize(("shard_bytes", "files"), [(None, 1), (400, 2), (1, 4)])
def test_the_library_reads_what_is_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], shard_bytes: int | None, files: int
) -> None:
    write(tmp_path, tensors, shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    found = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_what_the_library_writes_is_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert reader.names == set(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(UsageError, match="lacks the tensor z"):
        reader.read("z")


def test_files_that_are_not_whole(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path, tensors, 400)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = second.read_bytes()
    for damaged, words in (
        (content[:-3], "ends 3 bytes too early"),
        (content[:5], "no whole safetensors file"),
        (b"\xff" * 100, "its header is too long"),
        (content.replace(b'"I8"', b'"X8"'), "no whole safetensors file"),
    ):
        second.write_bytes(damaged)
        with pytest.raises(UsageError, match=words):
            TensorReader(tmp_path)
    second.unlink()
    with pytest.raises(UsageError, match=f"lacks {second.name}, which its index names"):
        TensorReader(tmp_path)
    first.unlink()
    (tmp_path / INDEX).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pytorch_model.bin is pickled, which may run code"):
        TensorReader(tmp_path)
