"""Sweeps: what a file asks for, what is refused, and results that no interruption changes. Nothing is trained."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling import slurm
from megatron_hyperp.scaling.axes import Search
from megatron_hyperp.scaling.ledger import RESULT_FILE, judge
from megatron_hyperp.scaling.point import CONTRACT
from megatron_hyperp.scaling.spec import Spec
from megatron_hyperp.scaling.sweep import Sweep
from tests.toy import write_corpus

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


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def launched(folder: Path) -> list[str]:
    path = folder / "launched.txt"
    return path.read_text().split() if path.exists() else []


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
    other += [{"train_tokens": 2304}, {"micro_batch_size": 2}, {"embedding_lr_mult": 2.0}]
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


def test_table(content: dict[str, Any], tmp_path: Path) -> None:
    assert sweep_of(content, tmp_path).run(workers=1) == 11
    rows = rows_of(tmp_path)
    assert tuple(rows[0])[:6] == CONTRACT
    assert list(rows[0])[6:] == ["eta0", "status", "run"]
    # The law takes sqrt(2), one step of the grid, off the deeper model's learning rate.
    assert [(row["depth"], row["eta0"]) for row in rows] == [
        *(("2", eta0) for eta0 in ("0.0212132", "0.03", "0.0424264", "0.06", "0.0848528")),
        *(("4", eta0) for eta0 in ("0.0212132", "0.03", "0.0424264", "0.06", "0.0848528", "0.12")),
    ]
    assert {row["status"] for row in rows} == {"finished"}
    best = [min((row for row in rows if row["depth"] == depth), key=lambda row: float(row["loss"])) for depth in "24"]
    assert [row["lr"] for row in best] == ["0.06", "0.05999999028"]
    assert not sweep_of(content, tmp_path).run(workers=1)


def test_interruptions_and_workers_leave_no_trace(content: dict[str, Any], tmp_path: Path) -> None:
    sweep_of(content, tmp_path / "straight").run(workers=1)
    expected = (tmp_path / "straight" / "results.csv").read_bytes()
    folder = tmp_path / "parts"
    second = sweep_of(content, folder)
    second.run(workers=1, only=second.spec.series[1:])
    assert [row["depth"] for row in rows_of(folder)] == ["4"] * len(rows_of(folder))
    half = folder / rows_of(folder)[0]["run"]
    (half / RESULT_FILE).unlink()
    (half / "leftover").write_text("of a run that was killed")
    (folder / "results.csv").unlink()
    sweep_of(content, folder).run(workers=3)
    assert not (half / "leftover").exists()
    assert (folder / "results.csv").read_bytes() == expected


def test_known_rows_count_where_the_folders_have_gone(content: dict[str, Any], tmp_path: Path) -> None:
    sweep_of(content, tmp_path / "here").run(workers=2)
    table = tmp_path / "here" / "results.csv"
    expected = table.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    assert not sweep_of(content, elsewhere, table).run(workers=1)
    assert not launched(elsewhere)
    assert table.read_bytes() == expected
    # Rows of other points than the sweep's stay, below its own.
    content["axes"]["num_layers"] = [4, 1]
    assert sweep_of(content, elsewhere, table).run(workers=1)
    rows = rows_of(tmp_path / "here")
    assert list(dict.fromkeys(row["depth"] for row in rows)) == ["4", "1", "2"]


def test_diverged_and_failed_are_recorded_and_not_repeated(content: dict[str, Any], tmp_path: Path) -> None:
    content["axes"] = {"lr": [0.06, 0.7, 1.5, 3.0]}
    content["set"]["num_layers"] = 2
    lines: list[str] = []
    sweep = sweep_of(content, tmp_path)
    sweep._say = lines.append
    assert sweep.run(workers=1) == 4
    found = [(row["loss"], row["status"]) for row in rows_of(tmp_path)]
    assert found == [("3.060000", "finished"), ("inf", "diverged"), ("inf", "diverged"), ("", "failed")]
    assert lines[0].startswith("[1/4] hyperp hyperp-d2-w64-0.00256M-lr0.06-s1-")
    assert "failed: error: out of memory, say" in lines[3]
    before = (tmp_path / "results.csv").read_bytes()
    assert not sweep_of(content, tmp_path).run(workers=1)
    again = sweep_of(content, tmp_path)
    again.ledger.forget_failures()
    assert again.run(workers=1) == 3
    assert len(launched(tmp_path)) == 7
    assert (tmp_path / "results.csv").read_bytes() == before


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


def test_a_search_takes_divergence_for_the_right_of_the_minimum_and_waits_after_failures(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["axes"] = {"num_layers": [2], "lr": {"start": 0.6, "factor": 3}}
    sweep_of(content, tmp_path / "diverged").run(workers=2)
    found = [(row["lr"], row["status"]) for row in rows_of(tmp_path / "diverged")]
    assert found == [
        *((lr, "finished") for lr in ("0.0222222", "0.0666667", "0.2")),
        *((lr, "diverged") for lr in ("0.6", "1.8")),
    ]
    content["axes"]["lr"]["start"] = 3.0
    sweep_of(content, tmp_path / "failed").run(workers=2)
    assert [row["status"] for row in rows_of(tmp_path / "failed")] == ["diverged", "failed", "failed"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_children_die_with_the_sweep(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The second training sends the sweep a signal and would run for ten minutes; then the sweep goes on."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_sweep import sweep_of; import yaml;"
        f"sweep_of(yaml.safe_load(Path(r'{tmp_path}/sweep.yaml').read_text()), Path(r'{tmp_path}')).run(workers=1)"
    )
    environment = {**os.environ, "FAKE_STOPS_AT": "lr0.03-", "FAKE_SIGNAL": name}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert ended.returncode == (-signal.SIGKILL if name == "SIGKILL" else -signal.SIGINT)
    (half,) = tmp_path.glob("*lr0.03-*")
    assert not (half / RESULT_FILE).exists()
    with (half / "lock").open() as lock:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("a training outlived the sweep")
    sweep_of(content, tmp_path).run(workers=1)
    sweep_of(content, tmp_path / "straight").run(workers=1)
    assert (tmp_path / "results.csv").read_bytes() == (tmp_path / "straight" / "results.csv").read_bytes()
    assert launched(tmp_path).count(half.name) == 2


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


def command_line(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the tool where there is no sbatch."""
    command = [sys.executable, "tools/sweep.py", *map(str, words)]
    environ = {**os.environ, "PATH": ""}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_command_line(content: dict[str, Any], tmp_path: Path) -> None:
    spec = tmp_path / "grid.yaml"
    content["slurm"] = {"time": "01:00:00", "gpus-per-task": 1}
    spec.write_text(yaml.safe_dump(content, sort_keys=False))
    listed = command_line(spec, "--list", "--output", tmp_path / "runs")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("to train") == 6
    printed = command_line(spec, "--print-slurm", "--workers", 2).stdout
    assert "sbatch --job-name=grid --array=0-1%2 " in printed
    assert "--time=01:00:00 --gpus-per-task=1 " in printed
    assert f"{ROOT / 'examples/slurm/sweep.sbatch'} {sys.executable} {ROOT / 'tools/sweep.py'} {spec}" in printed
    for words, message in [
        ((spec, "--task", 2), "--task is 2; "),
        ((tmp_path / "missing.yaml",), "cannot be read"),
        ((spec, "--slurm", "--output", tmp_path / "runs"), "there is no sbatch here"),
    ]:
        result = command_line(*words)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_submission(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\n[ "$2" = --array=0-1%4 ] && [ "$4" = examples/slurm/sweep.sbatch ] && echo Submitted batch job 7\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    spec, folder = Spec(content, source="sweep.yaml"), tmp_path / "runs"
    template = Path("examples/slurm/sweep.sbatch")
    command = slurm.array(spec, template, ["tools/sweep.py", "sweep.yaml"], name="grid", folder=folder, workers=4)
    assert slurm.submit(command, folder) == "Submitted batch job 7"
    assert folder.is_dir()
    with pytest.raises(UsageError, match="sbatch refuses"):
        slurm.submit(["sbatch", "--array=0-5"], folder)
