"""What a config resolves to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from megatron_hyperp import arguments, config
from megatron_hyperp import resolve as resolve_module
from megatron_hyperp.config import Config, data_parallel_size, width_multiplier
from megatron_hyperp.learning_rates import lr_multipliers

SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --vocab-size 64 --seq-length 16"
    " --global-batch-size 8 --train-iters 20"
)
PAPER = "--depth 12 --vocab-size 32000"


def parse(flags: str) -> Config:
    return arguments.parse(flags.split(), description="")


def resolve(flags: str, world_size: int = 1, tokenizer_vocab_size: int | None = None) -> Config:
    return parse(flags).resolve(world_size=world_size, tokenizer_vocab_size=tokenizer_vocab_size)


def sizes(resolved: Config) -> dict[str, int]:
    names = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels"
    return {name: getattr(resolved.model, name) for name in names.split()}


PAPER_SIZES = {
    "num_layers": 12,
    "hidden_size": 1536,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 24,
    "num_query_groups": 4,
    "kv_channels": 128,
}


def test_depth_derives_the_papers_architecture() -> None:
    resolved = resolve(PAPER)
    assert sizes(resolved) == PAPER_SIZES
    assert resolved.model.softmax_scale == pytest.approx(1 / math.sqrt(128))
    assert resolved.model.residual_multiplier == pytest.approx(1 / math.sqrt(24))
    assert resolved.model.embedding_init_std == 1e-4
    assert resolved.training.global_batch_size == 2**21 // 4096
    assert resolved.transfer.base_hidden_size == 1024


@pytest.mark.parametrize(
    ("name", "value", "followers"),
    [
        ("num_layers", 6, {}),
        ("hidden_size", 1024, {"ffn_hidden_size": 4096}),
        ("ffn_hidden_size", 2048, {}),
        ("num_attention_heads", 6, {"num_query_groups": 2}),
        ("num_query_groups", 8, {}),
        ("kv_channels", 64, {}),
        ("aspect_ratio", 64, {"hidden_size": 768, "ffn_hidden_size": 3072, "kv_channels": 64}),
    ],
)
def test_an_explicit_size_overrides_its_part_of_depth(name: str, value: int, followers: dict[str, int]) -> None:
    resolved = resolve(f"{PAPER} {config.flag_name(name)} {value}")
    own = {} if name == "aspect_ratio" else {name: value}
    assert sizes(resolved) == PAPER_SIZES | own | followers


def test_sizes_without_depth_have_megatrons_defaults() -> None:
    flags = "--num-layers 3 --hidden-size 96 --num-attention-heads 6 --vocab-size 100 --train-iters 5"
    assert sizes(resolve(flags)) == {
        "num_layers": 3,
        "hidden_size": 96,
        "ffn_hidden_size": 384,
        "num_attention_heads": 6,
        "num_query_groups": 6,
        "kv_channels": 16,
    }


def test_a_shallow_model_has_no_more_groups_than_heads() -> None:
    assert resolve("--depth 1 --vocab-size 64").model.num_query_groups == 2


def experts(resolved: Config) -> tuple[int, int, int, int]:
    moe = resolved.moe
    sizes = (moe.num_experts, moe.moe_router_topk, moe.moe_ffn_hidden_size)
    return (*sizes, moe.moe_shared_expert_intermediate_size)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # S x K experts of FFN size / K, of which one may be shared.
        ("--moe-sparsity 8 --moe-topk 8", (64, 8, 768, 0)),
        ("--moe-sparsity 8 --moe-topk 8 --moe-shared-expert", (63, 7, 768, 768)),
        ("--moe-sparsity 4 --moe-topk 1", (4, 1, 6144, 0)),
        ("--moe-sparsity 1 --moe-topk 2 --moe-shared-expert", (1, 1, 3072, 3072)),
        # Each explicit size overrides its part.
        ("--moe-sparsity 8 --moe-topk 8 --moe-shared-expert --num-experts 64", (64, 7, 768, 768)),
        ("--moe-sparsity 8 --moe-topk 8 --moe-router-topk 6 --moe-ffn-hidden-size 512", (64, 6, 512, 0)),
        ("--moe-sparsity 2 --moe-topk 4 --ffn-hidden-size 4096", (8, 4, 1024, 0)),
        # Megatron's terms and defaults.
        ("--num-experts 8", (8, 2, 6144, 0)),
        ("--num-experts 1", (1, 1, 6144, 0)),
        ("--num-experts 8 --moe-shared-expert --moe-ffn-hidden-size 128", (8, 2, 128, 128)),
        ("--num-experts 8 --moe-router-topk 3 --moe-shared-expert-intermediate-size 32", (8, 3, 6144, 32)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_experts_follow_from_sparsity_and_topk(flags: str, expected: tuple[int, int, int, int]) -> None:
    assert experts(resolve(f"{PAPER} {flags}")) == expected


def test_experts_do_not_change_the_token_budget() -> None:
    """With sparsity and top-k a token passes through as many parameters as in the dense model, but for the router."""
    mixture = resolve(f"{PAPER} --moe-sparsity 8 --moe-topk 8 --moe-shared-expert")
    assert mixture.training.train_tokens == resolve(PAPER).training.train_tokens


@pytest.mark.parametrize(
    ("optimizer", "dense", "mixture"),
    [("hyperp", 1.5e-2, 1.4e-2), ("muonh", 1.5e-2, 1.4e-2), ("muon", 1.5e-2, 1.5e-2), ("adamw", 6e-4, 6e-4)],
)
def test_eta0_is_that_of_the_kind_of_model(optimizer: str, dense: float, mixture: float) -> None:
    flags = f"{PAPER} --optimizer {optimizer}"
    assert resolve(flags).eta0 == resolve(flags).learning_rate().eta0 == dense
    for experts in ("--num-experts 8", "--moe-sparsity 8 --moe-topk 8 --moe-shared-expert"):
        resolved = resolve(f"{flags} {experts}")
        assert resolved.eta0 == resolved.learning_rate().eta0 == mixture
        # Nothing else in the law knows of experts: granularity changes no learning rate.
        assert resolved.learning_rate().multiplier == resolve(flags).learning_rate().multiplier
        assert resolve(f"{flags} {experts} --eta0 0.5").eta0 == 0.5


def test_token_budget_uses_the_base_model_of_the_same_family() -> None:
    base = resolve("--depth 2 --base-depth 2 --base-tokens 1e6 --aspect-ratio 33 --kv-channels 32 --vocab-size 64")
    assert base.training.train_tokens == pytest.approx(1e6, rel=0.1)  # its head size alone differs
    tied = resolve(f"{PAPER} --no-untie-embeddings-and-output-weights")
    assert tied.training.train_tokens > resolve(PAPER).training.train_tokens
    assert tied.model.embedding_init_std == 0.02


def test_vocabulary_is_the_tokenizers_padded() -> None:
    flags = SMALL.replace(" --vocab-size 64", "")
    assert resolve(flags, tokenizer_vocab_size=1000).model.vocab_size == 1024
    assert resolve(f"{flags} --make-vocab-size-divisible-by 10", tokenizer_vocab_size=1000).model.vocab_size == 1000
    assert resolve(SMALL, tokenizer_vocab_size=60).model.vocab_size == 64
    # The number of ranks counts only if they would not divide it.
    six = f"{flags} --num-attention-heads 6 --num-query-groups 6 --kv-channels 16 --ffn-hidden-size 96"
    for ranks, rows in ((2, 1024), (3, 1152), (6, 1536)):
        layout = f"{six} --tensor-model-parallel-size {ranks} --global-batch-size 12"
        assert resolve(layout, world_size=ranks, tokenizer_vocab_size=1000).model.vocab_size == rows


def test_the_vocabulary_before_padding_is_recorded() -> None:
    assert resolve(SMALL, tokenizer_vocab_size=60).model.unpadded_vocab_size == 60
    assert resolve(SMALL).model.unpadded_vocab_size is None
    # An imported model's own vocabulary stays, if the tokenizer knows fewer tokens.
    assert resolve(f"{SMALL} --unpadded-vocab-size 62", tokenizer_vocab_size=60).model.unpadded_vocab_size == 62
    without = SMALL.replace(" --vocab-size 64", "")
    model = resolve(f"{without} --unpadded-vocab-size 129", tokenizer_vocab_size=60).model
    assert (model.vocab_size, model.unpadded_vocab_size) == (256, 129)


def test_duration_follows_from_iterations_or_tokens() -> None:
    assert resolve(SMALL).training.train_tokens == 20 * 8 * 16
    by_tokens = SMALL.replace("--train-iters 20", "--train-tokens 1000")
    assert resolve(by_tokens).training.train_iters == 8
    assert resolve(by_tokens).training.train_tokens == 1000
    assert resolve(f"{by_tokens} --train-iters 8").training.train_iters == 8
    assert resolve(f"{PAPER} --train-iters 10").training.train_tokens == 10 * 2**21


def test_schedule_defaults() -> None:
    optimizer = resolve(f"{SMALL} --lr 0.05").optimizer
    assert (optimizer.min_lr, optimizer.lr_wsd_decay_iters) == (pytest.approx(0.005), 4)
    # The default decay of WSD never asks for more than the warm-up leaves.
    assert resolve(f"{SMALL} --lr-decay-style WSD --lr-warmup-iters 18").optimizer.lr_wsd_decay_iters == 2
    assert resolve(f"{SMALL} --min-lr 0").optimizer.min_lr == 0


def test_learning_rate_follows_the_config() -> None:
    flags = f"{SMALL} --eta0 0.04 --base-depth 16 --base-tokens 10240 --base-batch-tokens 32 --token-exponent 0.5"
    factors = [factor for _, _, factor in resolve(flags).learning_rate().factors]
    assert factors == pytest.approx([2.0, 2.0, 2.0])
    assert resolve(flags).learning_rate().value == pytest.approx(0.32)
    explicit = resolve(f"{flags} --lr 0.7").learning_rate()
    assert (explicit.value, explicit.factors) == (0.7, ())


@pytest.mark.parametrize(
    ("optimizer", "width", "decay", "residual"),
    [
        ("hyperp", 1.0, 0.0, 1 / math.sqrt(24)),
        ("muonh", 1.0, 0.0, 1.0),
        ("muon", 1.0, 0.1 * 8 / 12, 1 / math.sqrt(24)),
        ("adamw", 1024 / 1536, 0.1, 1.0),
    ],
)
def test_recipes_scale_the_model(optimizer: str, width: float, decay: float, residual: float) -> None:
    resolved = resolve(f"{PAPER} --optimizer {optimizer}")
    assert width_multiplier(resolved) == pytest.approx(width)  # of the matrices
    assert resolved.model.logits_multiplier == pytest.approx(width)
    assert resolved.optimizer.weight_decay == pytest.approx(decay)
    assert resolved.model.residual_multiplier == pytest.approx(residual)


ONES = dict.fromkeys(("hidden", "router", "output", "embedding", "vector", "qk_norm"), 1.0)


@pytest.mark.parametrize(
    ("flags", "others"),
    [
        ("", {}),
        ("--optimizer muon", {}),
        ("--optimizer adamw", {"hidden": 1024 / 1536, "router": 1024 / 1536}),
        ("--embedding-lr-mult 3", {"embedding": 3.0}),
        ("--adam-lr-mult 0.1 --qk-norm-lr-mult 0.3", {"output": 0.1, "vector": 0.1, "qk_norm": 0.1 * 0.3}),
        ("--adam-lr-mult 0.1 --output-lr-mult 2", {"output": 2.0, "vector": 0.1, "qk_norm": 0.1}),
        ("--num-experts 8 --router-lr-mult 0", {"router": 0.0}),
        # Width 1536 over 1024, depth 12 over 8.
        ("--lr-exponents embedding:width=2,depth=-1 output:depth=2", {"embedding": 1.5, "output": 2.25}),
        ("--lr-exponents vector:width=1 --adam-lr-mult 2", {"output": 2.0, "vector": 3.0, "qk_norm": 3.0}),
        ("--optimizer adamw --lr-exponents hidden:width=0", {"router": 1024 / 1536}),
        ("--train-tokens 4e9 --base-tokens 1e9 --lr-exponents hidden:tokens=0.5", {"hidden": 2.0}),
        ("--base-batch-tokens 524288 --global-batch-size 512 --lr-exponents hidden:batch=-1", {"hidden": 0.25}),
        ("--lr 0.1 --lr-preset marin-2608", dict.fromkeys(("embedding", "router", "vector", "qk_norm"), 3 / 13)),
    ],
)
def test_each_role_has_its_multiplier(flags: str, others: dict[str, float]) -> None:
    resolved = resolve(f"{PAPER} {flags}")
    assert lr_multipliers(resolved) == ONES | others
    absent = set() if resolved.moe.num_experts else {"router"}
    shown = {rate.role: rate.multiplier for rate in resolved.learning_rate().roles}
    expected = ONES | others
    if expected["qk_norm"] == expected["vector"]:
        absent.add("qk_norm")
    assert shown == {role: value for role, value in expected.items() if role not in absent}


def test_learning_rate_by_a_preset() -> None:
    flags = f"{PAPER} --lr-preset marin-2608"
    tokens, own = 28_488_664_987, resolve(flags)
    assert own.learning_rate().value == pytest.approx(34.35 * tokens**-0.346 * 1536**-0.345 * math.sqrt(2**21 / 8192))
    assert own.optimizer.min_lr == pytest.approx(0.1 * own.learning_rate().value)
    # The base model's, so that giving it changes nothing.
    assert own.eta0 == pytest.approx(34.35 * 10.4e9**-0.346 * 1024**-0.345 * 16)
    assert resolve(f"{flags} --eta0 {own.eta0!r}").learning_rate().value == pytest.approx(own.learning_rate().value)
    # Neither optimizer's own law, nor experts, change it.
    for other in ("--optimizer muonh", "--num-experts 8"):
        assert resolve(f"{flags} {other}").learning_rate().value == own.learning_rate().value
    assert resolve(f"{flags} --lr 0.1").learning_rate().value == 0.1
    assert (own.has_batch_law, resolve(f"{PAPER} --optimizer muonh").has_batch_law) == (True, False)


def test_roles_that_a_model_does_not_have_are_not_shown() -> None:
    resolved = resolve(f"{PAPER} --no-untie-embeddings-and-output-weights --no-qk-layernorm")
    assert [rate.role for rate in resolved.learning_rate().roles] == ["hidden", "embedding", "vector"]


def test_explicit_scaling_beats_the_recipe() -> None:
    flags = "--optimizer muon --weight-decay 0.3 --residual-multiplier 0.5 --logits-multiplier 2 --softmax-scale 1"
    resolved = resolve(f"{PAPER} {flags} --base-hidden-size 7 --embedding-init-std 0.1")
    assert resolved.optimizer.weight_decay == 0.3
    model = resolved.model
    assert (model.residual_multiplier, model.logits_multiplier, model.softmax_scale) == (0.5, 2.0, 1.0)
    assert (model.embedding_init_std, resolved.transfer.base_hidden_size) == (0.1, 7)


def test_resolving_leaves_the_original_alone() -> None:
    original = parse(SMALL)
    original.resolve()
    assert original == parse(SMALL)


def test_data_parallel_size_is_what_is_left() -> None:
    flags = f"{SMALL} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    assert data_parallel_size(resolve(flags, world_size=8), 8) == 2


RESOLVABLE = [
    SMALL,
    f"{SMALL} --lr 0.05 --lr-decay-style WSD --lr-warmup-iters 3",
    f"{SMALL} --optimizer adamw --weight-decay 0.2 --min-lr 0",
    PAPER,
    f"{PAPER} --optimizer muon --train-tokens 1.234e9 --seed 4294967295",
    f"{PAPER} --moe-sparsity 8 --moe-topk 8 --moe-shared-expert",
    f"{PAPER} --moe-sparsity 8 --moe-topk 8 --moe-shared-expert --num-experts 64 --moe-gate softmax",
    f"{SMALL} --num-experts 4",
    f"{PAPER} --lr-preset marin-2608 --lr-exponents embedding:width=-0.5,depth=0 vector:tokens=0.1",
    f"{PAPER} --lr 1e-3 --hidden-size 1024 --no-untie-embeddings-and-output-weights --data-path 0.5 a 0.5 12",
]


@pytest.mark.parametrize("flags", RESOLVABLE)
def test_a_resolved_config_resolves_to_itself(flags: str, tmp_path: Path) -> None:
    resolved = resolve(flags)
    path = tmp_path / "config.yaml"
    path.write_text(arguments.to_yaml(resolved))
    again = arguments.load_yaml(path).resolve()
    assert again == resolved
    assert again.learning_rate() == resolved.learning_rate()
    assert arguments.to_yaml(again) == arguments.to_yaml(resolved)


# Fields


def test_every_field_is_documented_and_named_once() -> None:
    fields = [item for kind in arguments.section_types().values() for item in dataclasses.fields(kind)]
    names = [item.name for item in fields]
    assert len(set(names)) == len(names)
    for item in fields:
        assert item.metadata["help"], item.name


def test_lists_are_not_shared() -> None:
    Config().data.data_path.append("a")
    assert Config().data.data_path == []


def test_every_default_is_in_range() -> None:
    resolve_module.check_ranges(Config())
