"""Plans of runs: the paper's budgets, layouts that fit, a config that the trainer takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments, device
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.planning.checkpoints import Storage, cadence
from megatron_hyperp.planning.inventory import shapes, stage_parameters
from megatron_hyperp.planning.layouts import Cluster, bubble, evaluate
from tools import plan_run

KEYS = {
    "depth",
    "hidden_size",
    "params_total",
    "params_active",
    "tokens",
    "flops",
    "lr",
    "lr_multiplier",
    "global_batch_tokens",
    "train_iters",
    "memory_bytes_per_gpu",
    "parallelism",
}


def plan(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    plan_run.main([*flags.split(), "--json"])
    return json.loads(capsys.readouterr().out)


def papers_parameters(depth: int) -> int:
    """N(d) of arXiv 2603.28743 with a = h = 128, H = 2d, G = 4, V = 32000."""
    a, h, heads, groups, vocabulary = 128, 128, 2 * depth, 4, 32000
    attention = 2 * a * depth**2 * heads * h + 2 * a * depth**2 * groups * h
    return 12 * a**2 * depth**3 + 2 * a * depth * vocabulary + attention


@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24])
def test_plans_have_the_papers_budget(capsys: pytest.CaptureFixture[str], depth: int) -> None:
    result = plan(capsys, f"--depth {depth} --gpus 64")
    parameters = papers_parameters(depth)
    tokens = round(10.4e9 * parameters / papers_parameters(8))
    assert result.keys() >= KEYS
    assert (result["depth"], result["hidden_size"]) == (depth, 128 * depth)
    assert result["params_total"] == result["params_active"] == parameters
    assert result["tokens"] == tokens
    assert result["flops"] == pytest.approx(
        tokens * 3 * (2 * parameters + 4 * depth * 2 * depth * 128 * 4096), rel=1e-12
    )
    assert result["lr"] == pytest.approx(0.015 * result["lr_multiplier"])
    assert result["lr_multiplier"] == pytest.approx(math.sqrt(8 / depth) * (tokens / 10.4e9) ** -0.32)
    assert result["global_batch_tokens"] == 2**21
    assert result["train_iters"] == math.ceil(tokens / 2**21)
    assert math.prod(result["parallelism"][name] for name in ("tp", "pp", "dp")) == 64


def test_figures_that_the_paper_prints(capsys: pytest.CaptureFixture[str]) -> None:
    base, larger, largest = (plan(capsys, f"--depth {depth}") for depth in (8, 12, 24))
    assert (base["params_total"], base["tokens"]) == (208_142_336, 10_400_000_000)
    assert larger["tokens"] == 28_488_664_987
    assert [f"{item['flops']:.3e}" for item in (base, larger, largest)] == ["2.136e+19", "1.491e+20", "5.961e+21"]
    assert f"{larger['lr_multiplier']:.4f}" == "0.5914"


def test_plans_follow_the_preset_and_the_laws_of_roles(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--depth 24 --gpus 64 --lr-preset marin-2608 --lr-exponents output:depth=1"
    result = plan(capsys, flags)
    lr = 34.35 * result["tokens"] ** -0.346 * 3072**-0.345 * math.sqrt(2**21 / 8192)
    assert result["lr"] == pytest.approx(lr)
    assert list(result["lr_factors"]) == ["width", "tokens", "batch"]
    assert result["lr_roles"] == {"hidden": 1.0, "output": 3.0, "embedding": 3 / 13, "vector": 3 / 13}
    plan_run.main(flags.split())
    shown = capsys.readouterr().out
    assert f"hyperp, learning rate {lr:.6g} = 34.35 (coefficient of marin-2608)" in shown
    assert f"output layer: {3 * lr:.6g} = learning rate x 3 (depth: (24 / 8)^1)" in shown


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 8 --gpus 8 --bf16",
        "--depth 8 --gpus 8 --bf16 --lr-preset marin-2608 --lr-exponents embedding:width=-0.5 vector:tokens=0.1",
        pytest.param("--depth 24 --gpus 64 --bf16 --gpu A100", marks=pytest.mark.matrix),
        "--depth 12 --gpus 8 --bf16 --moe-sparsity 8 --moe-topk 8 --num-experts 64",
        "--depth 8 --gpus 16 --optimizer adamw --tensor-model-parallel-size 2",
    ],
)
def test_the_trainer_takes_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    result = plan(capsys, flags)
    plan_run.main([*flags.split(), "--yaml", str(tmp_path / "plan.yaml")])
    config = arguments.parse(["--config", str(tmp_path / "plan.yaml")], description="")
    resolved = config.resolve(world_size=result["gpus"], tokenizer_vocab_size=32000)
    assert resolved.learning_rate().value == pytest.approx(result["lr"])
    assert resolved.training.train_iters == result["train_iters"]
    with device.planning_for("cuda"):
        gpu = GPUS["A100" if "A100" in flags else "H100"]
        again = evaluate(resolved, Cluster(gpu, result["gpus"]))
    assert resolved.training.recompute_granularity == result["recompute_granularity"]
    assert again.memory.to_dict() == result["memory_bytes_per_gpu"]
    assert again.parallelism == result["parallelism"]


def test_sizes_that_are_given_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--depth 8 --gpus 16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4"
    result = plan(capsys, flags + " --recompute-granularity full")
    assert result["parallelism"] == {"tp": 2, "pp": 4, "vpp": 1, "ep": 1, "dp": 2}
    assert result["recompute_granularity"] == "full"
    assert not result["alternatives"]


def test_fused_attention_leaves_nothing_to_selective_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    def modes(flags: str) -> list[str]:
        result = plan(capsys, f"--depth 16 --bf16 --gpus 8 {flags}")
        return [item["recompute_granularity"] for item in (result, *result["alternatives"])]

    assert modes("--micro-batch-size 2 --attention-backend local")[0] == "selective"
    assert modes("--micro-batch-size 2")[0] == "none"
    assert set(modes("--micro-batch-size 16")) == {"none", "full"}


def test_layouts_that_do_not_fit_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--depth 24 --bf16 --gpus 2 --moe-sparsity 8 --moe-topk 8 --num-experts 64"
    result = plan(capsys, flags)
    assert result["parallelism"] is result["memory_bytes_per_gpu"] is None
    reasons = {item["title"]: item["reason"] for item in result["rejected"]}
    assert "GiB of 71.1" in reasons["DP2"]
    plan_run.main(
        ["--depth", "24", "--bf16", "--gpus", "2", "--moe-sparsity", "8", "--moe-topk", "8", "--num-experts", "64"]
    )
    assert "No layout fits 2 GPUs" in capsys.readouterr().out


def test_what_fits_is_within_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, "--depth 20 --bf16 --gpus 16")
    shares = [item["memory_bytes_per_gpu"] for item in (result, *result["alternatives"])]
    for memory in shares:
        parts = {name: value for name, value in memory.items() if name != "total"}
        states = sum(parts.values()) - parts["activations"] - parts["step"]
        assert memory["total"] == states + max(parts["activations"], parts["step"]) <= 0.9 * GPUS["H100"].memory
    seconds = [item["ranking_seconds_per_step"] for item in (result, *result["alternatives"])]
    assert seconds == sorted(seconds)


def test_optimizer_state_falls_with_data_parallel_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (plan(capsys, f"--depth 8 --gpus {gpus}")["memory_bytes_per_gpu"] for gpus in (2, 8))
    for name in ("master", "momentum"):
        assert many[name] == pytest.approx(few[name] / 4, rel=0.02)
    assert many["weights"] == pytest.approx(few["weights"], rel=0.02)


def test_weights_in_fp8_send_less(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--depth 8 --bf16 --gpus 8 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --fp8-format hybrid"
    )
    plain = plan(capsys, flags)
    rounded, fewer = (
        plan(capsys, f"{flags} --fp8-param-gather {more}") for more in ("", "--num-layers-at-start-in-bf16 4")
    )
    before, after, between = (item["bytes_sent_per_gpu_and_step"]["data"] for item in (plain, rounded, fewer))
    # 6 bytes a weight; of the paper's d8, the matrices of transformer layers, 69% of its weights, take one less.
    embeddings = 2 * 32000 * 1024
    assert after / before == pytest.approx(1 - (1 - embeddings / plain["params_total"]) / 6, abs=0.002)
    assert between == pytest.approx((before + after) / 2)


def test_a_table_names_every_factor_of_the_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    plan_run.main(["--depth", "12", "--gpus", "16", "--bf16"])
    text = capsys.readouterr().out
    for word in ("570,163,200 parameters", "28,488,664,987 in 13,585 steps", "1.491e+20", "tokens:", "depth:", "Take "):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gpus 0", "--gpus is 0; it must be 1 or more"),
        ("--gpus-per-node -1", "--gpus-per-node is -1; it must be 1 or more"),
        ("--mfu 1.5", "--mfu is 1.5; it must be above 0 and at most 1"),
        ("--memory-fraction 0", "--memory-fraction is 0; it must be above 0 and at most 1"),
        ("--gpu H1000", "H1000"),
        ("--yaml /nowhere/plan.yaml", "--yaml /nowhere/plan.yaml cannot be written"),
        ("--gpus 3 --yaml -", "no layout fits 3 GPUs"),
        ("--gpus 8 16 --yaml -", "--yaml writes the config for one cluster; give it one number and one kind"),
        ("--checkpoint-bandwidth 0", "--checkpoint-bandwidth is 0; it must be a number above 0"),
        ("--checkpoint-bandwidth 1 --gpu-mtbf-hours -1", "--gpu-mtbf-hours is -1; it must be a number above 0"),
        ("--checkpoint-bandwidth 1 --restart-minutes -1", "--restart-minutes is -1; it must be a number, 0 or more"),
        ("--gpu-mtbf-hours 100", "--gpu-mtbf-hours needs --checkpoint-bandwidth"),
        ("--num-query-groups 3", "--num-query-groups 3 does not divide"),
    ],
)
def test_bad_input_is_one_line(flags: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_run.main(["--depth", "8", *flags.split()])


def test_a_pipeline_is_interleaved_where_that_saves_time(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(batch: int) -> dict[str, Any]:
        sizes = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 8"
        return plan(capsys, f"--depth 24 --bf16 --gpus 256 {sizes} --global-batch-size {batch}")

    result = chosen(512)
    assert result["parallelism"] == {"tp": 2, "pp": 8, "vpp": 3, "ep": 1, "dp": 16}
    assert result["pipeline_bubble"] == pytest.approx(7 / 32 / 3)
    # Four micro-batches do not make a round of eight.
    assert chosen(64)["parallelism"]["vpp"] == 1


def test_odd_experts_get_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth", "8", "--bf16", "--moe-sparsity", "8", "--moe-topk", "8", "--moe-shared-expert", "--gpus", "8"]
    plan_run.main(flags)
    assert "8 GPUs and 63 routed experts have no common divisor" in capsys.readouterr().out
    plan_run.main([*flags, "--num-experts", "64"])
    assert "no common divisor" not in capsys.readouterr().out


def test_several_clusters_make_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan_run.main(["--depth", "24", "--bf16", "--gpus", "5", "1", "--gpu", "H100", "H200"])
    head, indivisible, *large, one = capsys.readouterr().out.splitlines()[4:]
    assert head.split()[:6] == ["GPUs", "TP", "PP", "VPP", "EP", "DP"]
    assert indivisible.startswith("5 H100/H200  none: DP5: --global-batch-size 512 is not divisible")
    assert [line.partition(" GiB")[0] for line in large] == ["1 H100  none: one GPU: needs 80.6"]
    assert one.split()[:7] == ["1", "H200", "1", "1", "1", "1", "1"]


def test_saves_are_as_often_as_failures_ask(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--depth 8 --bf16 --gpus 64 --checkpoint-bandwidth 2"
    result = plan(capsys, flags)
    found, size = result["checkpoint_cadence"], result["checkpoint_bytes"]
    assert found["save_seconds"] == pytest.approx(size / 2e9)
    assert found["failure_hours"] == pytest.approx(50_000 / 64)
    assert found["young_seconds"] == pytest.approx(math.sqrt(2 * found["save_seconds"] * 3600 * found["failure_hours"]))
    assert found["daly_seconds"] == pytest.approx(found["young_seconds"], rel=0.02)
    assert plan(capsys, f"{flags} --gpu-mtbf-hours 5000")["checkpoint_cadence"]["lost"] > found["lost"]


def test_dalys_interval_loses_least() -> None:
    storage = Storage(bytes_per_s=1e9, gpu_mtbf_hours=1000.0, restart_minutes=5.0)
    best = cadence(10**11, storage, gpus=1000, step_seconds=1.0)

    def lost(seconds: float) -> float:
        """Of Daly's model, one step of so many seconds."""
        mean, save, restart = 3600.0, 100.0, 300.0
        return 1 - seconds / mean / math.exp(restart / mean) / math.expm1((seconds + save) / mean)

    assert best.lost == pytest.approx(lost(best.steps))
    assert best.lost < min(lost(factor * best.steps) for factor in (0.7, 0.9, 1.1, 1.4))
    # Failures more often than saves can be: work as long as one failure takes to come, and lose nearly all.
    assert cadence(10**13, storage, gpus=1000, step_seconds=1.0).daly_seconds == 3600.0


def test_stages_together_are_the_model() -> None:
    flags = "--depth 8 --vocab-size 32000 --moe-sparsity 8 --moe-topk 8 --pipeline-model-parallel-size 4"
    config = arguments.parse(flags.split(), description="").resolve(world_size=4)
    whole = {item.name: item.shape for item in shapes(config)}
    parts = [pair for stage in range(4) for pair in stage_parameters(config, stage)]
    assert len(parts) == len(whole)
    assert {name: tuple(value.shape) for name, value in parts} == whole


def test_a_pipeline_idles_at_its_ends() -> None:
    flags = "--depth 8 --vocab-size 512 --pipeline-model-parallel-size 4 --global-batch-size 16"
    config = arguments.parse(flags.split(), description="").resolve(world_size=8)
    assert bubble(config, 8) == 3 / 8
