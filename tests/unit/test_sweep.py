"""Sweeps: what a file asks for, what is refused, and results that no interruption changes. Nothing is trained."""

from __future__ import annotations

import fcntl
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hyperp.errors import UsageError
from megatron_hyperp.learning_rates import lr_multipliers
from megatron_hyperp.scaling.axes import Search
from megatron_hyperp.scaling.ledger import judge
from megatron_hyperp.scaling.spec import Spec
from megatron_hyperp.scaling.sweep import Sweep
from tests.commands import run_here
from tests.toy import write_corpus
from tools.sweep import main

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "fake_trainer.py"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("sweep"), documents=20)


@pytest.fixture
def content(prefix: str) -> dict[str, Any]:
    """A sweep of two depths and a searched learning rate."""
    return {
        "set": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "seq_length": 64,
            "global_batch_size": 4,
            "train_tokens": 2560,
            "base_depth": 2,
            "base_tokens": 2560,
            "base_batch_tokens": 256,
            "data_path": [prefix],
            "tokenizer_model": "null:64",
            "seed": 1,
        },
        "axes": {"num_layers": [2, 4], "eta0": {"start": 0.03}},
    }


def sweep_of(content: dict[str, Any], folder: Path, table: Path | None = None) -> Sweep:
    return Sweep(
        Spec(content, source="sweep.yaml"),
        folder=folder,
        table=table or folder / "results.csv",
        command=lambda config, ranks: [sys.executable, str(FAKE), "--config", str(config)],
        say=lambda line: None,
    )


def points(content: dict[str, Any]) -> list[Any]:
    return [series.point(power) for series in Spec(content, source="sweep.yaml").series for power in series.powers({})]


def test_grid_in_the_order_of_the_file(content: dict[str, Any]) -> None:
    content["axes"] = {"num_layers": [4, 2], "train_tokens": "1280/5120/2", "lr": [0.1, 0.05]}
    settings = [tuple(point.settings.values()) for point in points(content)]
    assert settings == [(d, t, lr) for d in (4, 2) for t in (1280, 2560, 5120) for lr in (0.1, 0.05)]
    iterations = [point.resolved.training.train_iters for point in points(content)]
    assert iterations == [5, 5, 10, 10, 20, 20] * 2


def test_blocks_have_settings_and_axes_of_their_own(content: dict[str, Any]) -> None:
    content["axes"] = {"num_layers": [2, 4], "eta0": [0.03]}
    content["blocks"] = [
        {},
        {"method": "wide", "set": {"num_layers": 2}, "axes": {"hidden_size": [128]}},
        {"set": {"optimizer": "adamw"}, "axes": {"eta0": [0.001, 0.002]}},
    ]
    found = [(point.method, point.resolved.model.num_layers, point.resolved.eta0) for point in points(content)]
    assert found == [
        *(("hyperp", 2, 0.03), ("hyperp", 4, 0.03), ("wide", 2, 0.03)),
        *(("adamw", 2, 0.001), ("adamw", 2, 0.002), ("adamw", 4, 0.001), ("adamw", 4, 0.002)),
    ]


def test_a_held_learning_rate_becomes_a_factor(content: dict[str, Any]) -> None:
    content["blocks"] = [{"set": {"embedding_lr": 0.06, "adam_lr": 0.02}}]
    for point in points(content):
        peak = point.resolved.learning_rate().value
        assert point.resolved.optimizer.embedding_lr_mult * peak == pytest.approx(0.06)
        assert point.resolved.optimizer.adam_lr_mult * peak == pytest.approx(0.02)
        assert point.row(["embedding_lr"])["embedding_lr"] == "0.06"


def test_a_held_learning_rate_does_not_follow_the_laws_of_roles(content: dict[str, Any]) -> None:
    content["set"] |= {"lr_exponents": "embedding:width=-1,tokens=0.5", "embedding_lr_mult": 7, "base_tokens": 1280}
    content["blocks"] = [{"set": {"embedding_lr": 0.06}}]
    for point in points(content):
        peak = point.resolved.learning_rate().value
        assert lr_multipliers(point.resolved)["embedding"] * peak == pytest.approx(0.06)


def test_gains_and_output_layer_are_held_together_or_not_at_all(content: dict[str, Any]) -> None:
    content["set"] |= {"lr_preset": "marin-2608"}
    content["blocks"] = [{"set": {"adam_lr": 0.06}}]
    with pytest.raises(UsageError, match=r"adam_lr cannot hold both .* 0\.2308 and 1 times .*; set output_lr_mult$"):
        points(content)
    content["set"] |= {"output_lr_mult": 2}
    for point in points(content):
        multipliers = lr_multipliers(point.resolved)
        assert multipliers["vector"] * point.resolved.learning_rate().value == pytest.approx(0.06)
        assert multipliers["output"] == 2


def test_row(content: dict[str, Any]) -> None:
    content["set"] |= {"moe_sparsity": 2, "moe_topk": 2}
    point = points(content)[-1]
    row = point.row(["num_layers", "eta0", "hidden_size", "softmax_scale", "qk_layernorm", "data_path"])
    parameters = 4 * (64 * 64 * 4 + 64 * (3 * 2 * 128 + 4)) + 2 * 128 * 64
    flops = 3 * (2 * parameters + 4 * 4 * 64 * 64) * 2560
    lr = float(f"{0.03 * math.sqrt(2):.6g}") * math.sqrt(1 / 2)
    expected = {"method": "hyperp", "depth": "4", "tokens": "2560", "flops": str(flops), "lr": f"{lr:.10g}"}
    expected |= {"eta0": "0.0424264", "hidden_size": "64", "softmax_scale": f"{math.sqrt(128) / 16:.10g}"}
    assert row == expected | {"qk_layernorm": "true", "data_path": content["set"]["data_path"][0]}


def test_key_is_of_what_decides_the_result(content: dict[str, Any]) -> None:
    def key(**settings: Any) -> str:
        return points({"set": {**content["set"], "lr": 0.03, "num_layers": 2, **settings}})[0].key

    same = [{}, {"eval_interval": 7}, {"num_workers": 2}, {"log_interval": 3}, {"eta0": 0.5}, {"train_iters": 10}]
    assert len({key(**settings) for settings in same}) == 1
    other = [{}, {"seed": 2}, {"lr": 0.031}, {"eval_iters": 9}, {"clip_grad": 2.0}, {"optimizer": "muonh"}]
    other += [{"train_tokens": 2304}, {"micro_batch_size": 2}, {"embedding_lr_mult": 2.0}, {"output_lr_mult": 1.0}]
    other += [{"lr_preset": "marin-2608"}, {"lr_exponents": "vector:width=1"}]
    other += [{"lr_exponents": "vector:width=1", "base_hidden_size": 32}]
    assert len({key(**settings) for settings in other}) == len(other)
    spelled = points({"set": {**content["set"], "eta0": 0.03, "num_layers": 2}})[0]
    assert spelled.key == key()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axis": {}}, ["key axis is unknown", "did you mean axes?"]),
        ({"axes": {"num_layer": [2]}}, ["num_layer is no field", "did you mean num_layers?"]),
        ({"axes": {"num_layers": 2}}, ["axis num_layers is 2", "list of values", "FROM/TO/FACTOR"]),
        ({"axes": {"num_layers": "4/2/2"}}, ["4/2/2", "FROM/TO/FACTOR"]),
        ({"axes": {"num_layers": [2, "x"]}}, ["num_layers is 'x'; it must be an integer"]),
        ({"axes": {"num_layers": [2, 2], "eta0": [0.03]}}, ["are the same training"]),
        ({"axes": {"depth": [2, 4], "num_layers": [2]}}, ["are the same training", "fixes"]),
        ({"axes": {"lr": [0.1], "num_layers": [2], "eta0": {"start": 0.1}}}, ["are the same training"]),
        ({"axes": {"num_layers": [2], "hidden_size": [66]}}, ["hidden_size 66", "--num-attention-heads 4"]),
        ({"axes": {"num_layers": {"start": 2}}}, ["a search is for learning rates"]),
        ({"axes": {"lr": {"begin": 2}}}, ["key begin of a search is unknown"]),
        ({"axes": {"lr": {"factor": 2}}}, ["lacks its start"]),
        ({"axes": {"lr": {"start": 0.1, "factor": 1}}}, ["factor > 1"]),
        ({"axes": {"lr": {"start": 0.1}, "adam_lr": {"start": 0.1}}}, ["lr, adam_lr at once"]),
        ({"axes": {"save": ["here"]}}, ["save is not for a sweep"]),
        ({"axes": {"num_layers": [2], "eval_iters": [0]}}, ["held-out losses", "eval_iters"]),
        ({"axes": {"num_layers": [2], "data_path": ["/nowhere/data"]}}, ["/nowhere/data.bin does not exist"]),
        ({"blocks": [{"set": {"lr": 0.1}, "axes": {"lr": [0.1]}}]}, ["both sets lr and has an axis"]),
        ({"blocks": {"set": {}}}, ["list of blocks"]),
        ({"ranks": 0}, ["ranks is 0"]),
        ({"config": "/nowhere.yaml"}, ["/nowhere.yaml cannot be read"]),
    ],
)
def test_refusals(content: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Spec(content | change, source="sweep.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_search_widens_until_the_minimum_lies_inside() -> None:
    def losses(powers: list[int], best: int) -> dict[int, float]:
        return {power: abs(power - best) for power in powers}

    search = Search("lr", 0.03)
    assert search.powers({}) == search.powers({0: 1.0, 1: 2.0}) == [-1, 0, 1]
    assert search.powers(losses([-1, 0, 1], best=0)) == [-1, 0, 1]
    assert search.powers(losses([-1, 0, 1], best=3)) == [-1, 0, 1, 2]
    assert search.powers(losses([-1, 0, 1, 2, 3, 4], best=3)) == [-1, 0, 1, 2, 3, 4]
    wide = Search("lr", 0.03, bracket=2)
    assert wide.powers(losses([-1, 0, 1], best=0)) == [-1, 0, 1, -2, 2]
    nothing_works = dict.fromkeys(range(-9, 2), math.inf)
    assert Search("lr", 0.03, limit=6).powers(nothing_works) == [-1, 0, 1, -2, -3, -4]
    assert [Search("lr", 0.03).value(power) for power in (-1, 0, 1, 2)] == [0.0212132, 0.03, 0.0424264, 0.06]


def test_judge(tmp_path: Path) -> None:
    def judged(*losses: float | None, exit_code: int = 0) -> tuple[str, str]:
        rows = [{"iteration": 10 * index, "eval_loss": loss} for index, loss in enumerate(losses)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = judge(tmp_path, exit_code, iterations=10, vocabulary=64)
        return result.status, result.text

    assert judge(tmp_path, 0, iterations=10, vocabulary=64).status == "failed"
    assert judged(4.2) == ("failed", "")
    assert judged(4.2, 3.1, exit_code=-9) == ("failed", "")
    assert judged(4.2, 3.1234567) == ("finished", "3.123457")
    assert judged(4.3, 4.2) == ("finished", "4.200000")
    assert judged(4.2, 4.2) == judged(4.2, None) == judged(9.0, math.log(64) + 0.6) == ("diverged", "inf")


def test_a_run_of_another_process_is_not_touched(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / points(content)[0].name
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being run by another process"):
            sweep_of(content, tmp_path).run(workers=1)


def test_a_foreign_table_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"results.csv is no table of a sweep \(it lacks the columns"):
        sweep_of(content, tmp_path)


def test_command_line(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no sbatch."""
    monkeypatch.setenv("PATH", "")
    spec = tmp_path / "grid.yaml"
    content["slurm"] = {"time": "01:00:00", "gpus-per-task": 1}
    spec.write_text(yaml.safe_dump(content, sort_keys=False))
    listed = run_here(main, spec, "--list", "--output", tmp_path / "runs", capsys=capsys)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("to train") == 6
    printed = run_here(main, spec, "--print-slurm", "--workers", 2, capsys=capsys).stdout
    assert "sbatch --job-name=grid --array=0-1%2 " in printed
    assert "--time=01:00:00 --gpus-per-task=1 " in printed
    assert f"{ROOT / 'examples/slurm/sweep.sbatch'} {sys.executable} {ROOT / 'tools/sweep.py'} {spec}" in printed
    for words, message in [
        ((spec, "--task", 2), "--task is 2; "),
        ((tmp_path / "missing.yaml",), "cannot be read"),
        ((spec, "--slurm", "--output", tmp_path / "runs"), "there is no sbatch here"),
    ]:
        result = run_here(main, *words, capsys=capsys)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
