"""The transfer laws one by one, the recipes that combine them, and the paper's numbers."""

from __future__ import annotations

import math

import pytest

from megatron_hyperp import transfer
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.estimate import parameter_count, train_flops_per_token
from megatron_hyperp.role_laws import QK_GAINS, ROLES, RoleLaw, RoleRate, Sizes, parse_exponents, role_laws
from megatron_hyperp.transfer import PRESETS, RECIPES, LearningRate, Recipe


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


# Laws of roles

SIZES = Sizes(width=2048, depth=18, tokens=4e9, batch=2**22)
BASE = Sizes(width=1024, depth=8, tokens=1e9, batch=2**21)


@pytest.mark.parametrize(
    ("law", "multiplier", "formulas"),
    [
        (RoleLaw(), 1.0, []),
        (RoleLaw(factor=0.3), 0.3, []),
        (RoleLaw(width=-1), 0.5, ["(2,048 / 1,024)^-1"]),
        (RoleLaw(width=1), 2.0, ["(2,048 / 1,024)^1"]),
        (RoleLaw(depth=-0.5), 2 / 3, ["(18 / 8)^-0.5"]),
        (RoleLaw(tokens=-0.25), math.sqrt(0.5), ["(4e+09 / 1e+09)^-0.25"]),
        (RoleLaw(batch=0.5), math.sqrt(2), ["sqrt(4,194,304 / 2,097,152 tokens)"]),
        (RoleLaw(factor=3, width=-0.5, tokens=1), 12 / math.sqrt(2), ["(2,048 / 1,024)^-0.5", "(4e+09 / 1e+09)^1"]),
    ],
)
def test_a_role_law_is_a_factor_times_powers(law: RoleLaw, multiplier: float, formulas: list[str]) -> None:
    assert law.multiplier(SIZES, BASE) == pytest.approx(multiplier, rel=1e-15)
    assert [formula for _, formula, _ in law.powers(SIZES, BASE)] == formulas
    assert law.multiplier(BASE, BASE) == law.factor


@pytest.mark.parametrize(("width", "base"), [(1536, 1024), (96, 7), (4096 * 3, 1000)])
def test_mup_is_the_plain_quotient_to_the_last_bit(width: int, base: int) -> None:
    own, other = (Sizes(width=size, depth=1, tokens=1, batch=1) for size in (width, base))
    assert RoleLaw(width=-1.0).multiplier(own, other) == base / width


def test_by_default_all_roles_share_the_learning_rate() -> None:
    assert set(role_laws(factors={}).values()) == {RoleLaw()}
    assert list(role_laws(factors={})) == [*ROLES, QK_GAINS]


def test_laws_of_roles() -> None:
    exponents = {"hidden": {"depth": 0.5}, "router": {"width": -0.5}, "vector": {"tokens": 0.1}}
    laws = role_laws(factors={"router": 0.5, "vector": 0.4}, qk_factor=0.5, width_mup=True, exponents=exponents)
    assert laws == {
        "hidden": RoleLaw(width=-1, depth=0.5),
        "router": RoleLaw(factor=0.5, width=-0.5),
        "output": RoleLaw(),
        "embedding": RoleLaw(),
        "vector": RoleLaw(factor=0.4, tokens=0.1),
        # They take the law of gains, with a further factor.
        QK_GAINS: RoleLaw(factor=0.2, tokens=0.1),
    }
    # What is given takes the place of muP's exponent.
    assert role_laws(factors={}, width_mup=True, exponents={"hidden": {"width": 0.0}})["hidden"] == RoleLaw()


@pytest.mark.parametrize(
    "words", [["embedding:width=-0.5,depth=0", "router:tokens=.1"], ["embedding:width=-5e-1,depth=0 router:tokens=0.1"]]
)
def test_exponents_are_read(words: list[str]) -> None:
    assert parse_exponents(words) == {"embedding": {"width": -0.5, "depth": 0.0}, "router": {"tokens": 0.1}}
    assert parse_exponents([]) == {}
    assert parse_exponents(["vector:width=1", "vector:depth=2"]) == {"vector": {"width": 1.0, "depth": 2.0}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("embeding:width=1", "roles are hidden, router, output, embedding, vector$"),
        ("width=1", "give ROLE:AXIS=EXPONENT"),
        ("vector:", "'' is no axis"),
        ("vector:width=1,", "'' is no axis"),
        ("vector:widths=1", "'widths' is no axis; axes are width, depth, tokens, batch$"),
        ("vector:width", "'' must be a finite number"),
        ("vector:width=nan", "'nan' must be a finite number"),
        ("vector:width=1=2", "'1=2' must be a finite number"),
        ("vector:width=1 vector:width=2", "vector has an exponent of width already"),
    ],
)
def test_words_that_are_no_exponents_are_refused(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_exponents([word])


def test_description_names_roles_with_a_learning_rate_of_their_own() -> None:
    law = RoleLaw(factor=0.25, width=-1)
    roles = tuple(
        RoleRate(role, law.factor, law.powers(SIZES, BASE))
        for role, law in {"hidden": RoleLaw(), "output": RoleLaw(width=-1), "embedding": law}.items()
    )
    assert LearningRate(0.002, (), (*roles, RoleRate("vector", 0.0, ()))).describe().splitlines() == [
        "learning rate 0.002 = 0.002 (eta0)",
        "    output layer: 0.001 = learning rate x 0.5 (width: (2,048 / 1,024)^-1)",
        "    embedding: 0.00025 = learning rate x 0.25 x 0.5 (width: (2,048 / 1,024)^-1)",
        "    gains and biases: 0 = learning rate x 0",
    ]


# Published presets. Sources: issues 7856 and 8435 of github.com/marin-community/marin.


def marin(width: int, tokens: float, batch_tokens: int) -> float:
    sizes = Sizes(width=width, depth=48, tokens=tokens, batch=batch_tokens)
    return transfer.preset_learning_rate("marin-2608", sizes, base=BASE, eta0=None).value


def test_marins_law_gives_the_learning_rates_that_marin_prints() -> None:
    # Issue 7856: width 6144, 15T tokens, 4096 sequences of 8192: 2.99e-3.
    assert f"{marin(6144, 15e12, 4096 * 8192):.2e}" == "2.99e-03"
    # Issue 8435, the run of 535B parameters: 390,139 steps of 11,264 sequences of 4096: 0.003291, by exponents of four
    # digits (-0.3461, -0.3448).
    batch = 11_264 * 4096
    assert marin(6144, 390_139 * batch, batch) == pytest.approx(0.003291, rel=2e-3)


def test_a_preset_transfers_from_a_base_that_was_tuned() -> None:
    own = transfer.preset_learning_rate("marin-2608", SIZES, base=BASE, eta0=None)
    base = transfer.preset_learning_rate("marin-2608", BASE, base=BASE, eta0=None)
    tuned = transfer.preset_learning_rate("marin-2608", SIZES, base=BASE, eta0=base.value)
    assert tuned.value == pytest.approx(own.value, rel=1e-12)
    assert transfer.preset_learning_rate("marin-2608", BASE, base=BASE, eta0=0.02).value == 0.02
    assert own.describe().splitlines() == [
        f"learning rate {own.value:.6g} = 34.35 (coefficient of marin-2608)",
        f"    x {2048**-0.345:<8.4g} width: 2,048^-0.345",
        f"    x {4e9**-0.346:<8.4g} tokens: 4e+09^-0.346",
        "    x 22.63    batch: sqrt(4,194,304 / 8,192 tokens)",
    ]


def test_presets_know_their_roles() -> None:
    for preset in PRESETS.values():
        assert preset is None or preset.factors.keys() <= ROLES.keys()
