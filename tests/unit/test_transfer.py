"""The transfer laws one by one, the recipes that combine them, and the paper's numbers."""

from __future__ import annotations

import math

import pytest

from megatron_hyperp import transfer
from megatron_hyperp.config import Config
from megatron_hyperp.estimate import parameter_count, train_flops_per_token
from megatron_hyperp.transfer import RECIPES, LearningRate, Recipe


def paper(depth: int) -> Config:
    config = Config()
    config.model.depth = depth
    config.model.vocab_size = 32000
    return config.resolve()


def total_flops(config: Config) -> float:
    return config.training.train_tokens * train_flops_per_token(config.model)


def learning_rate(recipe: Recipe, depth: int = 18, tokens: float = 2.6e9, batch_tokens: float = 2**23) -> LearningRate:
    """The laws' factors at the default sizes: depth sqrt(8/18) = 2/3, tokens 4^0.32, batch sqrt(4) = 2."""
    return transfer.learning_rate(recipe, eta0=0.01, depth=depth, tokens=tokens, batch_tokens=batch_tokens)


# The paper's numbers


def test_the_base_model_is_the_papers() -> None:
    config = paper(8)
    assert parameter_count(config.model) == 208_142_336
    assert config.training.train_tokens == 10.4e9
    assert config.batch_tokens == 2**21
    assert config.training.train_iters == math.ceil(10.4e9 / 2**21)
    assert total_flops(config) == pytest.approx(2.136e19, rel=1e-3)
    assert config.learning_rate().value == 1.5e-2


def test_depth_12_is_the_papers() -> None:
    config = paper(12)
    assert config.training.train_tokens == 28_488_664_987
    assert total_flops(config) == pytest.approx(1.491e20, rel=1e-3)
    assert config.learning_rate().multiplier == pytest.approx(0.5914, abs=1e-4)
    assert config.learning_rate().value == pytest.approx(1.5e-2 * 0.5914, abs=1e-5)


def test_depth_24_is_the_papers_largest() -> None:
    assert total_flops(paper(24)) == pytest.approx(6e21, rel=0.01)


@pytest.mark.parametrize("depth", [2, 4, 8, 12, 16, 20, 24])
def test_closed_formula_counts_the_parameters(depth: int) -> None:
    a, heads, groups, head_size, vocabulary = 128, 2 * depth, 4, 128, 32000
    expected = 12 * a**2 * depth**3 + 2 * a * depth * vocabulary + 2 * a * depth**2 * (heads + groups) * head_size
    assert parameter_count(paper(depth).model) == expected


def test_tied_embeddings_count_once() -> None:
    config = paper(8)
    config.model.untie_embeddings_and_output_weights = False
    assert parameter_count(config.model) == 208_142_336 - 32000 * 1024


def test_flops_are_those_of_matrices_and_attention() -> None:
    model = paper(8).model
    scores_and_values = 2 * 2 * model.seq_length * model.num_attention_heads * model.kv_channels
    assert train_flops_per_token(model) == 3 * (2 * parameter_count(model) + 8 * scores_and_values)


def test_token_budget_grows_with_the_parameters() -> None:
    assert transfer.token_budget(300, 100) == 31_200_000_000
    assert transfer.token_budget(2, 3, 100.0) == 67


# Laws


@pytest.mark.parametrize(
    ("law", "name", "factor"),
    [("depth_law", "depth", 2 / 3), ("token_law", "tokens", 4**0.32), ("batch_law", "batch", 2)],
)
def test_each_law_alone(law: str, name: str, factor: float) -> None:
    transferred = learning_rate(Recipe(eta0=1.0, moe_eta0=1.0, weight_decay=0.0, **{law: True}))
    assert [name for name, _, _ in transferred.factors] == [name]
    assert transferred.multiplier == pytest.approx(factor)
    assert transferred.value == pytest.approx(0.01 * factor)


def test_all_laws_are_neutral_on_the_base_model() -> None:
    for recipe in RECIPES.values():
        base = learning_rate(recipe, transfer.BASE_DEPTH, transfer.BASE_TOKENS, transfer.BASE_BATCH_TOKENS)
        assert base.value == 0.01


def test_base_values_and_exponent_can_be_others() -> None:
    transferred = transfer.learning_rate(
        RECIPES["hyperp"], eta0=0.055, depth=4, tokens=4e6, batch_tokens=4096,
        base_depth=2, base_tokens=1e6, base_batch_tokens=2048, token_exponent=0.5,
    )  # fmt: skip
    factors = [factor for _, _, factor in transferred.factors]
    assert factors == pytest.approx([math.sqrt(0.5), 0.5, math.sqrt(2)])
    assert transferred.value == pytest.approx(0.055 * 0.5)


@pytest.mark.parametrize(
    ("name", "laws"),
    [("hyperp", ["depth", "tokens", "batch"]), ("muonh", []), ("muon", ["depth", "batch"]), ("adamw", ["batch"])],
)
def test_recipes_apply_their_laws(name: str, laws: list[str]) -> None:
    assert [law for law, _, _ in learning_rate(RECIPES[name]).factors] == laws


@pytest.mark.parametrize(("name", "decay"), [("hyperp", 0.0), ("muonh", 0.0), ("muon", 0.1 * 8 / 24), ("adamw", 0.1)])
def test_weight_decay_of_the_recipes(name: str, decay: float) -> None:
    recipe = RECIPES[name]
    assert transfer.weight_decay(recipe, base_weight_decay=recipe.weight_decay, depth=24) == pytest.approx(decay)


@pytest.mark.parametrize(("name", "multiplier"), [("hyperp", 0.25), ("muon", 0.25), ("muonh", 1.0), ("adamw", 1.0)])
def test_residual_multiplier_of_the_recipes(name: str, multiplier: float) -> None:
    assert transfer.residual_multiplier(RECIPES[name], 8) == pytest.approx(multiplier)


def test_softmax_scale_is_that_of_mup() -> None:
    assert transfer.softmax_scale(128) == pytest.approx(1 / math.sqrt(128))
    assert transfer.softmax_scale(64) == pytest.approx(2 * transfer.softmax_scale(128))


def test_description_names_every_factor() -> None:
    assert learning_rate(RECIPES["hyperp"]).describe().splitlines() == [
        "learning rate 0.0207777 = 0.01 (eta0)",
        "    x 0.6667   depth: sqrt(8 / 18)",
        "    x 1.558    tokens: (2.6e+09 / 1.04e+10)^-0.32",
        "    x 2        batch: sqrt(8,388,608 / 2,097,152 tokens)",
    ]
    assert LearningRate(0.002, ()).describe() == "learning rate 0.002 = 0.002 (eta0)"
