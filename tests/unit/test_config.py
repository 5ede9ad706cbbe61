"""What a config resolves to, and every refusal: the flag it names and the way out."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_hyperp import arguments, config, precision
from megatron_hyperp import resolve as resolve_module
from megatron_hyperp.config import Config, data_parallel_size, width_multiplier
from megatron_hyperp.errors import UsageError

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


# Resolution

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
    resolve_module._check_ranges(Config())


# Refusals


class Refusal(NamedTuple):
    """Flags that cannot run, and what the message says: the flags it names, then the way out."""

    flags: str
    names: str
    mends: str
    options: dict[str, int] | None = None


TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
TWO = {"world_size": 2}
TP2SP = f"{TP2} --sequence-parallel"
EXPERTS = f"{SMALL} --num-experts 4"
WITHOUT_VOCABULARY = SMALL.replace(" --vocab-size 64", "")

REFUSALS = [
    # Ranges
    Refusal(f"{SMALL} --lr 0", "--lr is 0", "greater than 0"),
    Refusal(f"{SMALL} --lr=-1", "--lr is -1", "greater than 0"),
    Refusal(f"{SMALL} --lr nan", "--lr is nan", "a finite number greater than 0"),
    Refusal(f"{SMALL} --train-tokens inf", "--train-tokens is inf", "a finite number at least 0"),
    Refusal(f"{SMALL} --depth 0", "--depth is 0", "greater than 0"),
    Refusal(f"{SMALL} --micro-batch-size 0", "--micro-batch-size is 0", "greater than 0"),
    Refusal(f"{SMALL} --weight-decay=-0.1", "--weight-decay is -0.1", "at least 0"),
    Refusal(f"{SMALL} --hidden-size -64", "--hidden-size is -64", "at least 0"),
    Refusal(f"{SMALL} --muon-momentum 1", "--muon-momentum is 1", "at least 0 and below 1"),
    Refusal(f"{SMALL} --adam-beta1 1.5", "--adam-beta1 is 1.5", "at least 0 and below 1"),
    Refusal(f"{SMALL} --adam-beta2=-0.5", "--adam-beta2 is -0.5", "at least 0 and below 1"),
    Refusal(f"{SMALL} --seed 4294967296", "--seed is 4.29", r"from 0 to 2\^32 - 1"),
    # Architecture
    Refusal("--hidden-size 64", "--num-layers", "or --depth"),
    Refusal("--num-layers 4", "--hidden-size", "or --depth"),
    Refusal("--num-layers 4 --hidden-size 64", "--num-attention-heads", "or --depth"),
    Refusal(
        f"{SMALL} --hidden-size 66",
        "--hidden-size 66 .*--num-attention-heads 4",
        r"64 and 68 \(or give --kv-channels\)",
    ),
    Refusal(f"{SMALL} --num-query-groups 3", "--num-query-groups 3 .*--num-attention-heads 4", "that do: 1, 2, 4$"),
    Refusal(f"{SMALL} --kv-channels 15", "--kv-channels is 15", "even head size, 16, say"),
    Refusal(f"{SMALL} --hidden-size 12", "--kv-channels is 3", "even head size, 4, say"),
    Refusal(WITHOUT_VOCABULARY, "vocabulary is not known", "give --tokenizer-model or --vocab-size"),
    Refusal(SMALL, "65 tokens, more than --vocab-size 64", "raise it, or leave it out", {"tokenizer_vocab_size": 65}),
    # Layout
    Refusal(
        f"{SMALL} {TP2}",
        r"3 rank\(s\) cannot hold .* 2 x 1 = 2;",
        "a multiple of 2 ranks, or lower --tensor-model-parallel-size",
        {"world_size": 3},
    ),
    Refusal(
        f"{SMALL} {TP2} {PP2}",
        r"6 rank\(s\) cannot hold .* 2 x 2 = 4;",
        "a multiple of 4 ranks, or lower .* or --pipeline-model-parallel-size",
        {"world_size": 6},
    ),
    Refusal(
        f"{SMALL} --tensor-model-parallel-size 8",
        "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4",
        "fit this model: 1, 2$",
        {"world_size": 8},
    ),
    Refusal(
        f"{SMALL} --tensor-model-parallel-size 4",
        "--tensor-model-parallel-size 4 does not divide --num-query-groups 2",
        "fit this model: 1, 2$",
        {"world_size": 4},
    ),
    Refusal(f"{SMALL} {TP2} --ffn-hidden-size 99", f"{TP2} .*--ffn-hidden-size 99", "fit this model: 1$", TWO),
    Refusal(f"{SMALL} {TP2} --vocab-size 65", f"{TP2} .*--vocab-size 65", "fit this model: 1$", TWO),
    Refusal(
        f"{SMALL} --sequence-parallel", "--sequence-parallel", "--tensor-model-parallel-size above 1; leave it out"
    ),
    Refusal(
        f"{SMALL} {TP2} --sequence-parallel --seq-length 15",
        f"--sequence-parallel .*--seq-length .*{TP2} divides, not 15",
        "the nearest: 14 and 16$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --num-virtual-stages-per-pipeline-rank 2",
        "--num-virtual-stages-per-pipeline-rank 2 needs --pipeline-model-parallel-size above 1",
        "leave it out, or raise that",
    ),
    Refusal(f"{SMALL} {PP2} --num-layers 5", "--num-layers 5 .*--pipeline-model-parallel-size", "4 and 6$", TWO),
    Refusal(f"--depth 3 --vocab-size 64 {PP2}", "--depth 3 .*--pipeline-model-parallel-size", "2 and 4$", TWO),
    Refusal(
        f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 3",
        "--num-layers 4 .*--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = 6",
        "the nearest that are: 6$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --recompute-granularity full --recompute-num-layers 3",
        "--recompute-num-layers 3 .*4 layers",
        "1, 2, 4$",
    ),
    Refusal(
        f"{SMALL} {PP2} --recompute-granularity full --recompute-method block --recompute-num-layers 3",
        "--recompute-num-layers 3",
        "give 2 at most",
        TWO,
    ),
    # Experts
    Refusal(f"{SMALL} --moe-sparsity=-1", "--moe-sparsity is -1", "at least 0"),
    Refusal(f"{EXPERTS} --moe-expert-capacity-factor 0", "--moe-expert-capacity-factor is 0", "greater than 0"),
    Refusal(f"{SMALL} --moe-sparsity 4", "--moe-sparsity needs --moe-topk", "together they make S x K experts"),
    Refusal(f"{SMALL} --moe-topk 4", "--moe-topk needs --moe-sparsity", "together they make S x K experts"),
    Refusal(
        f"{SMALL} --moe-sparsity 4 --moe-topk 1 --moe-shared-expert",
        "--moe-shared-expert leaves none of --moe-topk 1",
        "give 2 or more, or leave it out",
    ),
    Refusal(
        f"{SMALL} --moe-sparsity 4 --moe-topk 7",
        "--moe-topk 7 does not divide the FFN size 256",
        "the nearest --ffn-hidden-size: 252 and 259$",
    ),
    Refusal(
        f"{EXPERTS} --moe-router-topk 5",
        "--moe-router-topk 5 is more than the 4 routed experts",
        "give 4 at most",
    ),
    Refusal(
        f"{SMALL} --moe-sparsity 1 --moe-topk 4 --num-experts 3",
        "--moe-router-topk 4 is more than the 3 routed experts",
        "give 3 at most",
    ),
    *(
        Refusal(f"{SMALL} {flag}", f"{flag.split()[0]} .*needs experts", "--num-experts, or .* or leave it out$")
        for flag in (
            "--moe-shared-expert",
            "--moe-router-topk 2",
            "--moe-ffn-hidden-size 64",
            "--moe-shared-expert-intermediate-size 64",
            "--moe-z-loss-coeff 1e-3",
            "--moe-expert-capacity-factor 1.5",
            "--moe-balance-statistics exact",
        )
    ),
    Refusal(
        f"{EXPERTS} --moe-balance-statistics exact --moe-router-load-balancing-type aux_loss",
        "--moe-balance-statistics exact needs .*--moe-router-load-balancing-type is aux_loss",
        "leave it out, or give global and a weight above 0$",
    ),
    Refusal(
        f"{EXPERTS} --moe-balance-statistics exact --moe-aux-loss-coeff 0",
        "--moe-balance-statistics exact needs .*--moe-aux-loss-coeff 0",
        "leave it out, or give global and a weight above 0$",
    ),
    Refusal(f"{SMALL} --expert-model-parallel-size 2", "--expert-model-parallel-size 2 needs experts", "--num-experts"),
    Refusal(
        f"{SMALL} --expert-tensor-parallel-size 2 {TP2}",
        "--expert-tensor-parallel-size 2 needs experts",
        "leave it out, or give --num-experts",
        TWO,
    ),
    Refusal(
        f"{SMALL} --expert-model-parallel-size 2 --expert-tensor-parallel-size 4",
        "--expert-model-parallel-size 2 needs experts",
        "leave it out, or give --num-experts",
        {"world_size": 8},
    ),
    Refusal(f"{EXPERTS} {TP2}", f"experts under {TP2} need --sequence-parallel", "give it", TWO),
    Refusal(
        f"{PAPER} --moe-sparsity 8 --moe-topk 8 --moe-shared-expert --expert-model-parallel-size 8",
        "--expert-model-parallel-size 8 does not divide the 63 routed experts",
        "those that do: 1, 3, 7, 9, 21, 63; the nearest --num-experts that it divides: 56 and 64$",
        {"world_size": 8},
    ),
    Refusal(
        f"{EXPERTS} --expert-tensor-parallel-size 2",
        "--expert-tensor-parallel-size is 2; it must be 1, or --tensor-model-parallel-size",
        "which is 1$",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 4",
        "--expert-tensor-parallel-size is 4; it must be 1, or --tensor-model-parallel-size",
        "which is 2$",
        {"world_size": 4},
    ),
    Refusal(
        f"{EXPERTS} {TP2SP} --expert-tensor-parallel-size 2 --moe-ffn-hidden-size 33",
        "--expert-tensor-parallel-size 2 does not divide --moe-ffn-hidden-size 33",
        "the nearest: 32 and 34$",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} --moe-ffn-hidden-size 34",
        "--moe-ffn-hidden-size / --expert-tensor-parallel-size is 34; experts are multiplied in groups",
        "a multiple of 4; the nearest: 32 and 36$",
    ),
    Refusal(
        f"{EXPERTS} --bf16 --hidden-size 68 --kv-channels 16",
        "--hidden-size is 68; experts are multiplied in groups",
        "a multiple of 8; the nearest: 64 and 72$",
    ),
    Refusal(f"{SMALL} --fp8-emulation", "--fp8-emulation needs --fp8-format", "give hybrid or e4m3, or leave it out$"),
    Refusal(f"{SMALL} --fp8-weight-scale sphere", "--fp8-weight-scale sphere needs --fp8-format", "leave it out$"),
    Refusal(
        f"{SMALL} --num-layers-at-start-in-bf16 1", "--num-layers-at-start-in-bf16 needs --fp8-format", "leave it out$"
    ),
    Refusal(
        f"{SMALL} --num-layers-at-end-in-bf16 1", "--num-layers-at-end-in-bf16 needs --fp8-format", "leave it out$"
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --num-layers-at-start-in-bf16 90 --num-layers-at-end-in-bf16 1",
        "--num-layers-at-start-in-bf16 90 and --num-layers-at-end-in-bf16 1 leave none of the",
        "lower them, or leave out --fp8-format$",
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max",
        "--fp8-amax-history-len needs --fp8-format and --fp8-recipe delayed",
        "give both, or leave it out$",
    ),
    Refusal(f"{SMALL} --fp8-amax-compute-algo max", "max needs --fp8-format and --fp8-recipe", "leave it out$"),
    Refusal(f"{SMALL} --fp8-margin 1", "--fp8-margin needs --fp8-format and --fp8-recipe delayed", "leave it out$"),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4",
        "--fp8-amax-history-len 4 keeps steps that --fp8-amax-compute-algo most_recent does not look at",
        "give max, or leave the length out$",
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-compute-algo max",
        "--fp8-amax-compute-algo max needs --fp8-amax-history-len above 1",
        "give a length, 1024 say",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --transformer-impl transformer_engine",
        "--fp8-emulation is of Megatron-Core's local layers, not of --transformer-impl transformer_engine",
        "leave one of them out$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --transformer-impl local",
        "--transformer-impl local has no FP8 but in emulation",
        "give --fp8-emulation$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-recipe delayed --num-layers-at-end-in-bf16 1",
        "--fp8-recipe delayed takes every layer to FP8 or none",
        "give --fp8-recipe tensorwise$",
    ),
    Refusal(
        f"{SMALL} --num-layers 4 {PP2} --fp8-format e4m3 --num-layers-at-start-in-bf16 3",
        "--num-layers-at-start-in-bf16 3 and --num-layers-at-end-in-bf16 0 can each be 2 at most",
        "lower them$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-recipe blockwise",
        "--hidden-size is [0-9]+, but --fp8-recipe blockwise needs multiples of 128",
        "the nearest: 128$",
    ),
    Refusal(f"{SMALL} --fp8-format e4m3 --fp8-recipe rowwise", "rowwise needs --fp8-emulation", "no such recipe$"),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-weight-scale sphere", "sphere needs --fp8-emulation", "no static scales$"
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --fp8-recipe mxfp8 --fp8-weight-scale sphere",
        "one scale a matrix, which --fp8-recipe mxfp8 has not",
        "give tensorwise$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --fp8-weight-scale sphere --optimizer muon",
        "needs weights on spheres, which --optimizer muon leaves",
        "give hyperp or muonh$",
    ),
    Refusal(
        f"{SMALL} --attention-backend sdpa --recompute-granularity selective",
        "--recompute-granularity selective recomputes what --attention-backend sdpa does not keep",
        "leave it out, or give full$",
    ),
    Refusal(
        f"{SMALL} --cross-entropy-fusion-impl te",
        "--cross-entropy-fusion-impl te needs --cross-entropy-loss-fusion",
        "give it, or leave it out$",
    ),
    Refusal(
        f"{SMALL} --cross-entropy-loss-fusion",
        "--cross-entropy-loss-fusion rounds gradients to bf16",
        "give --bf16, or te, or leave it out$",
    ),
    Refusal(
        f"{SMALL} --gradient-accumulation-fusion --fp8-format hybrid --fp8-emulation",
        "--gradient-accumulation-fusion .*--fp8-emulation",
        "leave one out$",
    ),
    Refusal(
        f"{EXPERTS} {PP2} --expert-model-parallel-size 4",
        r"2 rank\(s\) cannot hold expert x expert-tensor x pipeline parallelism 4 x 1 x 2",
        "a multiple of 8 ranks, or lower --expert-model-parallel-size",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} {TP2SP} --moe-shared-expert-intermediate-size 33",
        f"{TP2} does not divide --moe-shared-expert-intermediate-size 33",
        "the nearest: 32 and 34$",
        TWO,
    ),
    # Batch
    Refusal(f"{SMALL} --micro-batch-size 3", "--global-batch-size 8 .*--micro-batch-size", "that are: 6 and 9$"),
    Refusal(f"{SMALL} --micro-batch-size 16", "--global-batch-size 8 .*--micro-batch-size .*16", "that are: 16$"),
    Refusal(f"{SMALL}", "--global-batch-size 8 .*data-parallel ranks = 3", "that are: 6 and 9$", {"world_size": 3}),
    Refusal(
        f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 9",
        f"--global-batch-size 9 makes 9 micro-batches.* {PP2}",
        "the nearest: 8 and 10$",
        TWO,
    ),
    # Duration and schedule
    Refusal(
        f"{SMALL} --train-tokens 1000",
        "--train-iters 20 and --train-tokens 1000 contradict",
        "the tokens take 8 iterations; give one",
    ),
    Refusal(SMALL.replace(" --train-iters 20", ""), "how long", "give --train-iters or --train-tokens"),
    Refusal(f"{SMALL} --lr 0.1 --min-lr 0.2", "--min-lr 0.2 .*rate 0.1", "lower it"),
    Refusal(f"{SMALL} --ns-form gram --ns-dtype bf16", "--ns-form gram .*bf16", "give fp16 or fp32"),
    Refusal(f"{SMALL} --ns-strategy gram --ns-form standard", "--ns-strategy gram .*standard", "leave one out"),
    Refusal(f"{SMALL} --ns-strategy gram --ns-dtype bf16", "--ns-strategy gram .*bf16", "give fp16 or fp32"),
    Refusal(f"{SMALL} --lr-warmup-iters 20", "--lr-warmup-iters 20 .*20 iterations", "give 19 at most"),
    Refusal(
        f"{SMALL} --lr-decay-style WSD --lr-warmup-iters 15 --lr-wsd-decay-iters 6",
        "--lr-wsd-decay-iters 6",
        "give 5 at most",
    ),
]


def refused(refusal: Refusal, match: str | None = None) -> UsageError:
    with pytest.raises(UsageError, match=match) as caught:
        resolve(refusal.flags, **(refusal.options or {}))
    return caught.value


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.names)
def test_what_cannot_run_is_refused(refusal: Refusal) -> None:
    error = refused(refusal, match=f"{refusal.names}.*{refusal.mends}")
    assert error.same_on_all_ranks
    assert "\n" not in str(error)
    known = arguments.build_parser("")._option_string_actions
    assert set(re.findall(r"--[a-z][a-z0-9-]*", str(error))) <= set(known)


def test_every_refusal_has_a_test() -> None:
    frames = [traceback.extract_tb(refused(refusal).__traceback__)[-1] for refusal in REFUSALS]
    reached = {(frame.filename, frame.lineno) for frame in frames}
    for module in (resolve_module, precision):
        nodes = ast.walk(ast.parse(inspect.getsource(module)))
        raised = {(module.__file__, node.lineno) for node in nodes if isinstance(node, ast.Raise) and node.exc}
        assert raised <= reached
        reached -= raised
    assert not reached


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        (f"{SMALL} {TP2} --sequence-parallel", 2),
        (f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 2", 4),
        (f"{SMALL} --recompute-granularity full --recompute-method block --recompute-num-layers 3", 1),
        (f"{SMALL} --recompute-granularity selective --recompute-num-layers 3", 1),
        (f"{SMALL} --lr-warmup-iters 19 --lr 0.1 --min-lr 0.1", 1),
        (f"{SMALL} --lr-decay-style WSD --lr-warmup-iters 15 --lr-wsd-decay-iters 5", 1),
        (f"{SMALL} --muon-momentum 0 --adam-beta1 0 --weight-decay 0 --clip-grad 0", 8),
        (f"{SMALL} --attention-backend sdpa --recompute-granularity full", 1),
        (f"{SMALL} --cross-entropy-loss-fusion --bf16", 1),
        (f"{SMALL} --cross-entropy-loss-fusion --cross-entropy-fusion-impl te", 1),
        (f"{SMALL} --no-gradient-accumulation-fusion --fp8-format hybrid --fp8-emulation", 1),
        # Harmless without experts: one command line serves dense models and mixtures.
        (f"{SMALL} --moe-gate softmax --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type none", 1),
        (f"{SMALL} --moe-token-dispatcher-type allgather", 1),
        (f"{SMALL} --moe-sparsity 4 --moe-topk 1", 1),
        (f"{SMALL} --moe-sparsity 1 --moe-topk 2 --moe-shared-expert", 1),
        (f"{EXPERTS} --moe-router-topk 4 --moe-balance-statistics exact --moe-z-loss-coeff 1e-3", 1),
        (f"{EXPERTS} {TP2SP} --expert-tensor-parallel-size 2 --expert-model-parallel-size 2", 4),
        # Expert parallelism may reach over tensor-parallel ranks.
        (f"{EXPERTS} {TP2SP} --expert-model-parallel-size 4", 4),
    ],
)
def test_what_can_run_is_not_refused(flags: str, world_size: int) -> None:
    resolve(flags, world_size=world_size)
