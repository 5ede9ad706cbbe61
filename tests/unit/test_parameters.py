"""Roles, rules and names of parameters."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp.optim.options import RECIPES, HyperPConfig
from megatron_hyperp.optim.routing import describe, route
from megatron_hyperp.parameters import (
    REPLICATED,
    ROLES,
    global_shape,
    is_expert,
    mark_expert_parameters,
    named_parameters,
    partition_dim,
    role_of,
)


def parameter(*shape: int, split: int | None = None) -> torch.nn.Parameter:
    result = torch.nn.Parameter(torch.ones(shape))
    if split is not None:
        result.tensor_model_parallel, result.partition_dim = True, split  # type: ignore[attr-defined]
    return result


NAMES = {
    "embedding.word_embeddings.weight": ("embedding", (8, 4)),
    "output_layer.weight": ("output", (8, 4)),
    "decoder.layers.3.self_attention.linear_qkv.weight": ("hidden", (8, 4)),
    "decoder.layers.3.self_attention.linear_proj.weight": ("hidden", (4, 4)),
    "decoder.layers.3.mlp.linear_fc1.weight": ("hidden", (16, 4)),
    "decoder.layers.3.mlp.linear_fc2.weight": ("hidden", (4, 8)),
    "decoder.layers.3.mlp.router.weight": ("router", (6, 4)),
    "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight": ("hidden", (16, 4)),
    "decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight": ("hidden", (4, 8)),
    "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": ("hidden", (16, 4)),
    "decoder.layers.3.mlp.shared_experts.linear_fc2.weight": ("hidden", (4, 8)),
    "decoder.layers.3.self_attention.q_layernorm.weight": ("vector", (4,)),
    "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": ("vector", (4,)),
    "decoder.final_layernorm.weight": ("vector", (4,)),
    "decoder.layers.3.mlp.linear_fc1.bias": ("vector", (16,)),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_every_known_parameter_has_one_role(name: str, expected: tuple[str, tuple[int, ...]]) -> None:
    role, shape = expected
    assert role_of(name, parameter(*shape)) == role


def test_a_parameter_without_a_role_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no role for the parameter decoder.layers.0.mixer.A_log of shape \(4, 4\)"):
        role_of("decoder.layers.0.mixer.A_log", parameter(4, 4))


def test_a_parameter_with_two_roles_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROLES, "extra", ("*word_embeddings*",))
    with pytest.raises(ValueError, match=r"2 roles \(embedding, extra\)"):
        role_of("embedding.word_embeddings.weight", parameter(8, 4))


def test_a_role_with_the_wrong_shape_is_an_error() -> None:
    for name, shape in (("decoder.layers.0.mlp.linear_fc1.weight", (4,)), ("decoder.final_layernorm.weight", (4, 4))):
        with pytest.raises(ValueError, match="has the role"):
            role_of(name, parameter(*shape))


def test_the_last_stage_copy_of_tied_embeddings_is_an_embedding() -> None:
    copy = parameter(8, 4)
    copy.shared_embedding = True  # type: ignore[attr-defined]
    assert role_of("output_layer.weight", copy) == "embedding"


def test_global_shapes() -> None:
    assert global_shape(parameter(8, 4, split=0), 4) == (32, 4)
    assert global_shape(parameter(8, 4, split=1), 4) == (8, 16)
    assert global_shape(parameter(8, 4), 4) == (8, 4)
    assert partition_dim(parameter(3)) == -1


class Layer(torch.nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.weight = parameter(2, 2)


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_names_count_layers_over_the_whole_model() -> None:
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([Layer(3), Layer(4)])
    names = [name for name, _ in named_parameters(Wrapper(Wrapper(chunk)))]
    assert names == ["decoder.layers.2.weight", "decoder.layers.3.weight"]


def mixture(layer: Layer, experts: list[int]) -> Layer:
    """Give a layer a mixture of experts with the given numbers, router and shared expert."""

    def linear(name: str) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_module(name, torch.nn.Module())
        module.get_submodule(name).register_parameter("weight", parameter(2, 2))
        return module

    layer.mlp = torch.nn.Module()
    layer.mlp.local_expert_indices = experts  # as Megatron-Core's MoELayer has them
    layer.mlp.layer_number = layer.layer_number
    layer.mlp.experts = torch.nn.Module()
    for index in range(len(experts)):
        grouped = torch.nn.Module()
        grouped.register_parameter(f"weight{index}", parameter(2, 2))
        layer.mlp.experts.register_module(f"linear_fc{1 + index % 2}", grouped)
    layer.mlp.shared_experts = linear("linear_fc1")
    layer.mlp.router = torch.nn.Module()
    layer.mlp.router.register_parameter("weight", parameter(6, 2))
    return layer


def test_names_count_experts_over_all_expert_parallel_ranks() -> None:
    """And layers, beside them, over the whole model; the numbers in the chunk are others, and overlap."""
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([mixture(Layer(3), [2, 3]), mixture(Layer(1), [0, 1])])
    names = [name for name, _ in named_parameters(Wrapper(Wrapper(chunk)))]
    assert names == [
        f"decoder.layers.{layer}.{rest}"
        for layer, experts in ((2, (2, 3)), (0, (0, 1)))
        for rest in (
            "weight",
            f"mlp.experts.local_experts.{experts[0]}.linear_fc1.weight",
            f"mlp.experts.local_experts.{experts[1]}.linear_fc2.weight",
            "mlp.shared_experts.linear_fc1.weight",
            "mlp.router.weight",
        )
    ]
    assert {role_of(name, value) for name, value in named_parameters(chunk) if "mlp" in name} == {"hidden", "router"}


@pytest.mark.parametrize("expert_tensor_parallel_size", [1, 2])
def test_routed_experts_alone_are_marked(expert_tensor_parallel_size: int) -> None:
    chunk = torch.nn.Module()
    chunk.layers = torch.nn.ModuleList([mixture(Layer(1), [4, 5])])
    for value in chunk.parameters():
        # Under tensor parallelism the constructor of an expert's matrix says that it is split.
        value.tensor_model_parallel, value.partition_dim = True, 0  # type: ignore[attr-defined]
    mark_expert_parameters(Wrapper(chunk), expert_tensor_parallel_size)
    dims = {"linear_fc1": 0, "linear_fc2": 1}
    for name, value in chunk.named_parameters():
        assert is_expert(value) == (".experts." in name), name
        split = dims[name.split(".")[-2]] if is_expert(value) else 0
        if is_expert(value) and expert_tensor_parallel_size == 1:
            split = REPLICATED
        assert partition_dim(value) == split, name
    assert sum(map(is_expert, chunk.parameters())) == 2


@pytest.mark.parametrize("optimizer", RECIPES)
def test_routes(optimizer: str) -> None:
    pairs = [(name, parameter(*shape)) for name, (_, shape) in NAMES.items()]
    mults = {"hidden": 0.5, "router": 0.25, "embedding": 3.0, "output": 0.1, "vector": 0.1, "qk_norm": 0.05}
    options = HyperPConfig(lr=1.0, optimizer=optimizer, radius_scale=2.0, lr_mults=mults)
    routes = route(pairs, options, tensor_parallel_size=1)
    assert [entry.name for entry in routes] == list(NAMES)
    by_name = {entry.name: entry for entry in routes}
    hidden = by_name["decoder.layers.3.mlp.linear_fc1.weight"]
    head = by_name["output_layer.weight"]
    router = by_name["decoder.layers.3.mlp.router.weight"]
    assert hidden.rule.name == router.rule.name == optimizer.replace("hyperp", "muonh")
    assert by_name["embedding.word_embeddings.weight"].rule.name == "adamw"
    assert router.lr_mult == 0.25
    assert (hidden.lr_mult, head.lr_mult, by_name["embedding.word_embeddings.weight"].lr_mult) == (0.5, 0.1, 3.0)
    gains = {name: entry.lr_mult for name, entry in by_name.items() if entry.role == "vector"}
    assert {name for name, factor in gains.items() if factor == pytest.approx(0.05)} == {
        name for name in gains if "q_layernorm" in name or "k_layernorm" in name
    }
    assert set(gains.values()) == {0.1, 0.05}
    assert [entry.decays for entry in routes if entry.role in ("embedding", "vector")] == [False] * 5
    if optimizer in ("hyperp", "muonh", "normuonh"):
        assert hidden.radius == pytest.approx(2.0 * (16 / 3) ** 0.5)
        assert head.radius == pytest.approx(0.02 * 32**0.5)
    else:
        assert hidden.radius is None
        assert head.radius is None
    table = describe(routes)
    assert table.splitlines()[0].split() == ["parameter", "rule", "global", "shape", "radius", "lr", "x", "count"]
    assert len(table.splitlines()) == len(NAMES) + 1


def test_frozen_parameters_get_no_rule() -> None:
    frozen, trained = parameter(4), parameter(4)
    frozen.requires_grad_(False)
    routes = route([("frozen", frozen), ("trained", trained)], HyperPConfig(lr=1.0), tensor_parallel_size=1)
    assert [entry.name for entry in routes] == ["trained"]
