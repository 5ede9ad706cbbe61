"""Parameters and FLOPs by formula, against sums over the matrices' shapes; the paper's mixtures of experts."""

from __future__ import annotations

import math

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.estimate import parameter_count, train_flops_per_token

PAPER_MOE = "--moe-sparsity 8 --moe-topk 8 --moe-shared-expert"


def resolve(flags: str) -> Config:
    return arguments.parse(flags.split(), description="").resolve(tokenizer_vocab_size=32000)


def counts(config: Config) -> tuple[int, int]:
    """All parameters, and those that a token passes through."""
    return parameter_count(config.model, config.moe), parameter_count(config.model, config.moe, active=True)


def shapes(config: Config, routed: int) -> list[tuple[int, int]]:
    """Of every matrix, with so many of a layer's routed experts."""
    model, moe, width = config.model, config.moe, config.model.hidden_size
    heads, groups = model.num_attention_heads, model.num_query_groups

    def mlp(ffn: int) -> list[tuple[int, int]]:
        return [(2 * ffn, width), (width, ffn)]

    layer = [((heads + 2 * groups) * model.kv_channels, width), (width, heads * model.kv_channels)]
    if moe.num_experts:
        layer += [(moe.num_experts, width)] + routed * mlp(moe.moe_ffn_hidden_size)
        layer += mlp(moe.moe_shared_expert_intermediate_size)
    else:
        layer += mlp(model.ffn_hidden_size)
    ends = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * layer + ends * [(model.vocab_size, width)]


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 8",
        "--depth 12 --no-untie-embeddings-and-output-weights --num-query-groups 3 --kv-channels 32",
        f"--depth 8 {PAPER_MOE}",
        f"--depth 24 {PAPER_MOE} --num-experts 64",
        "--depth 8 --moe-sparsity 4 --moe-topk 1",
        "--depth 8 --moe-sparsity 64 --moe-topk 16",
        "--depth 4 --num-experts 8 --moe-ffn-hidden-size 96 --moe-shared-expert-intermediate-size 80",
        "--depth 4 --num-experts 6 --moe-router-topk 3 --no-untie-embeddings-and-output-weights",
    ],
)
def test_counts_are_sums_over_shapes(flags: str) -> None:
    config = resolve(flags)
    for count, routed in zip(counts(config), (config.moe.num_experts, config.moe.moe_router_topk), strict=True):
        assert count == sum(rows * columns for rows, columns in shapes(config, routed))


@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24])
@pytest.mark.parametrize(("sparsity", "topk", "shared"), [(8, 8, True), (8, 8, False), (4, 2, True), (1, 1, False)])
def test_active_parameters_are_the_dense_models_and_the_router(
    depth: int, sparsity: int, topk: int, shared: bool
) -> None:
    flags = f"--depth {depth} --moe-sparsity {sparsity} --moe-topk {topk}" + shared * " --moe-shared-expert"
    config, dense = resolve(flags), resolve(f"--depth {depth}")
    router = depth * config.moe.num_experts * 128 * depth
    total, active = counts(config)
    assert active == counts(dense)[0] + router
    # All S x K experts, shared or not, are as large as S dense MLPs.
    mlps = depth * 3 * (128 * depth) * (512 * depth)
    assert total == active + (sparsity - 1) * mlps


def test_the_papers_largest_mixture_has_22_9_billion_parameters() -> None:
    total, active = counts(resolve(f"--depth 24 {PAPER_MOE}"))
    assert total == pytest.approx(22.9e9, rel=2e-3)
    assert active == pytest.approx(3.9e9, rel=0.02)


def test_flops_count_active_parameters() -> None:
    config, dense = resolve(f"--depth 8 {PAPER_MOE}"), resolve("--depth 8")
    router = 8 * 63 * 1024
    assert train_flops_per_token(config.model, config.moe) == train_flops_per_token(dense.model) + 6 * router
    # Without experts the second argument changes nothing.
    assert train_flops_per_token(dense.model, dense.moe) == train_flops_per_token(dense.model)


def test_learning_rate_starts_from_eta0_of_the_kind_of_model() -> None:
    assert resolve("--depth 8").learning_rate().value == 1.5e-2
    mixture = resolve(f"--depth 12 {PAPER_MOE}").learning_rate()
    assert mixture.eta0 == 1.4e-2
    assert mixture.value == pytest.approx(1.4e-2 * 0.5914, abs=1e-5)
    assert mixture.multiplier == pytest.approx(math.sqrt(8 / 12) * (28_488_664_987 / 10.4e9) ** -0.32)
