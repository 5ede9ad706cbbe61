"""Every recipe in examples/configs resolves, to the paper's numbers, on the ranks that its comment says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.config import Config, data_parallel_size
from megatron_hyperp.errors import UsageError
from megatron_hyperp.estimate import parameter_count, train_flops_per_token

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "configs"
DEPTHS = (8, 12, 16, 20, 24)
# By the paper's laws from depth 8: 10.4e9 tokens, eta0 1.5e-2 dense and 1.4e-2 with experts.
DENSE = {8: 208_142_336, 12: 570_163_200, 16: 1_238_368_256, 20: 2_313_420_800, 24: 3_895_984_128}
TOKENS = {8: 10.4e9, 12: 28_488_664_987}
FLOPS = {8: 2.136e19, 12: 1.491e20, 24: 5.961e21}
FACTOR = {8: 1.0, 12: 0.5914}


def recipe(name: str, flags: str = "", world_size: int = 1, vocabulary: int = 32000) -> Config:
    argv = ["--config", str(FOLDER / f"{name}.yaml"), *flags.split()]
    return arguments.parse(argv, description="").resolve(world_size=world_size, tokenizer_vocab_size=vocabulary)


def comment(name: str) -> str:
    """The file's head as one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_every_recipe_is_known_here() -> None:
    paper = {f"{kind}_d{depth}" for kind in ("dense", "moe") for depth in DEPTHS}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == paper | {"quickstart", "quickstart_moe"}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_recipe_is_the_papers_model(kind: str, depth: int) -> None:
    config = recipe(f"{kind}_d{depth}")
    model, moe = config.model, config.moe
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (depth, 128 * depth, 512 * depth)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (2 * depth, 4, 128)
    assert (model.seq_length, model.vocab_size) == (4096, 32000)
    assert config.batch_tokens == 2**21
    active = parameter_count(model, moe, active=True)
    assert active == DENSE[depth] + depth * model.hidden_size * moe.num_experts
    if kind == "moe":
        assert (moe.num_experts, moe.moe_router_topk) == (63, 7)
        assert moe.moe_ffn_hidden_size == moe.moe_shared_expert_intermediate_size == 64 * depth
    assert config.training.train_tokens == pytest.approx(10.4e9 * DENSE[depth] / DENSE[8], abs=1)
    assert config.training.train_tokens == TOKENS.get(depth, config.training.train_tokens)
    learning_rate = config.learning_rate()
    assert learning_rate.eta0 == {"dense": 1.5e-2, "moe": 1.4e-2}[kind]
    expected = (8 / depth) ** 0.5 * (DENSE[depth] / DENSE[8]) ** -0.32
    assert learning_rate.multiplier == pytest.approx(expected, rel=1e-9)
    assert learning_rate.multiplier == pytest.approx(FACTOR.get(depth, expected), abs=1e-4)
    if kind == "dense" and depth in FLOPS:
        flops = config.training.train_tokens * train_flops_per_token(model, moe)
        assert flops == pytest.approx(FLOPS[depth], rel=1e-3)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_comment_tells_the_numbers(kind: str, depth: int) -> None:
    name = f"{kind}_d{depth}"
    config, said = recipe(name), comment(name)
    model, moe, training = config.model, config.moe, config.training
    total, active = parameter_count(model, moe), parameter_count(model, moe, active=True)
    flops = training.train_tokens * train_flops_per_token(model, moe)
    mantissa, exponent = f"{flops:.3e}".split("e+")
    for words in (
        f"Width {model.hidden_size}, {model.num_attention_heads} heads of 128",
        f"{total:,}",
        f"{active:,}",
        f"{training.train_tokens / 1e9:.1f}B training tokens = {training.train_iters} batches",
        f"{mantissa}e{exponent} FLOPs; learning rate {config.learning_rate().value:.4g}.",
        *([f"7 of 63 routed experts of FFN {moe.moe_ffn_hidden_size}"] if kind == "moe" else []),
    ):
        assert words in said


def started(name: str) -> tuple[Config, int]:
    """The config and ranks of the command in the comment."""
    command = re.search(
        r"torchrun (.*?)examples/pretrain_gpt.py --config (\S+)((?: \\? ?--\S+(?: [\w.]+)?)*)", comment(name)
    )
    assert command is not None
    launcher, path, flags = command.groups()
    assert path == f"examples/configs/{name}.yaml"
    sizes = [int(size) for size in re.findall(r"--n(?:nodes|proc-per-node) (\d+)", launcher)]
    ranks = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
    assert "--data-path PREFIX --tokenizer-model FILE" in flags
    return recipe(name, flags.replace("\\", " "), ranks), ranks


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*_*.yaml")))
def test_the_command_in_the_comment_fits(name: str) -> None:
    config, ranks = started(name)
    assert data_parallel_size(config, ranks) * config.parallel.tensor_model_parallel_size == ranks
    if ranks > 8 and config.moe.num_experts:
        assert config.parallel.expert_model_parallel_size == 8


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 64),
        *((f"--expert-model-parallel-size {size} --global-batch-size 504", size) for size in (3, 7, 9, 21, 63)),
        ("--expert-model-parallel-size 7 --global-batch-size 504", 56),
        *((f"--expert-model-parallel-size {size} --num-experts 64", 64) for size in (2, 4, 8, 64)),
        ("--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 8 --num-experts 64", 32),
        ("--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --num-experts 64", 32),
    ],
)
def test_layouts_that_fit_the_mixtures(depth: int, flags: str, ranks: int) -> None:
    recipe(f"moe_d{depth}", flags, ranks)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--expert-model-parallel-size 8", "does not divide the 63 routed experts"),
        ("--expert-model-parallel-size 7", "--global-batch-size 512 is not divisible"),
    ],
)
def test_layouts_that_do_not_fit_the_mixtures(flags: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        recipe("moe_d8", flags, 56)


def test_the_quickstarts_differ_in_experts_alone() -> None:
    dense, mixture = recipe("quickstart", vocabulary=2048), recipe("quickstart_moe", vocabulary=2048)
    assert mixture.model == dense.model
    assert (mixture.training, mixture.transfer) == (dense.training, dense.transfer)
    moe = mixture.moe
    assert (moe.num_experts, moe.moe_router_topk, moe.moe_ffn_hidden_size) == (16, 3, 128)
    total, active = parameter_count(mixture.model, moe), parameter_count(mixture.model, moe, active=True)
    assert f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active" in comment("quickstart_moe")
    assert active == parameter_count(dense.model) + 4 * 128 * 16
    for ranks in (2, 4, 8, 16):
        recipe("quickstart_moe", f"--expert-model-parallel-size {ranks} --micro-batch-size 2", ranks, 2048)
