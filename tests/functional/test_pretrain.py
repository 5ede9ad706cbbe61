"""The real entry point: resume bit for bit, load under another layout, survive being killed, refuse bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp.training.checkpointing import TRACKER, find_checkpoint
from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.functional.launch import ROOT, command, environment, run, train, write_config
from tests.toy import VOCABULARY, toy_config, write_corpus

TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    prefix = write_corpus(folder)
    write_config(toy_config(prefix, folder / "unused", lr=None, depth=4, aspect_ratio=16), folder / "config.yaml")
    return folder


def flags(folder: Path, **kinds: str) -> list[str]:
    """--run-dir in the folder, and --save or --load there under the given names."""
    places = [word for kind, name in kinds.items() for word in (f"--{kind}", str(folder / name))]
    return ["--run-dir", str(folder), *places]


def training_rows(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["iteration"]: row for row in read_metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def straight(workspace: Path) -> Path:
    """Twenty iterations in one go, TP = 2, with everything switched on that a run can write."""
    folder = workspace / "straight"
    output = train(
        workspace / "config.yaml",
        *(*flags(folder, save="checkpoints"), "--save-interval", 5, "--keep", 2, *TP2),
        *("--eval-interval", 10, "--eval-iters", 2, "--peak-tflops", 0.1),
        *("--tensorboard-dir", folder / "tensorboard", "--wandb-project", "test"),
        ranks=2,
    )
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def stopped(workspace: Path) -> Path:
    """Stopped at iteration 10, TP = 2."""
    folder = workspace / "resumed"
    train(workspace / "config.yaml", *flags(folder, save="checkpoints"), *TP2, "--exit-interval", 10, ranks=2)
    return folder


def test_run_folder(straight: Path) -> None:
    rows = read_metrics(straight)
    assert [row["iteration"] for row in rows if "eval_loss" in row] == [0, 10, 20]
    assert sorted(training_rows(straight)) == list(range(1, 21))
    row = training_rows(straight)[20]
    assert {"iteration", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "radius_drift", "mfu"} <= set(row)
    assert row["tokens"] == 20 * 32 * 64
    assert row["loss"] < training_rows(straight)[1]["loss"]
    assert "depth: 4" in (straight / "config.yaml").read_text()
    assert list((straight / "tensorboard").glob("events.out.*"))
    assert list((straight / "wandb").glob("offline-run-*"))


def test_output_says_what_was_decided(straight: Path) -> None:
    output = (straight / "output.txt").read_text()
    assert "learning rate 0." in output
    assert "depth: sqrt(8 / 4)" in output
    assert "decoder.layers.*.self_attention.linear_qkv.weight   muonh" in output
    assert "iteration 20/20 (100%)" in output
    assert "tok/s | MFU" in output
    assert "Traceback" not in output


def test_old_checkpoints_are_dropped(straight: Path) -> None:
    checkpoints = straight / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000015", "iter_0000020", TRACKER]
    assert (checkpoints / TRACKER).read_text() == "20\n"
    assert (checkpoints / "iter_0000020" / "config.yaml").read_text() == (straight / "config.yaml").read_text()


def test_resume_is_bit_for_bit(workspace: Path, straight: Path, stopped: Path) -> None:
    output = train(workspace / "config.yaml", *flags(stopped, save="checkpoints", load="checkpoints"), *TP2, ranks=2)
    assert "at iteration 10" in output
    expected, got = training_rows(straight), training_rows(stopped)
    assert sorted(got) == list(range(1, 21))
    for iteration in range(1, 21):
        for key in ("loss", "grad_norm", "lr", "tokens", "radius_drift"):
            assert got[iteration][key] == expected[iteration][key], (iteration, key)


@pytest.mark.parametrize(("layout", "ranks"), [((), 1), (PP2, 2)], ids=["one rank", "PP2"])
def test_another_layout_goes_on(
    workspace: Path, straight: Path, stopped: Path, layout: tuple[Any, ...], ranks: int
) -> None:
    folder = workspace / f"other-{ranks}"
    load = ("--load", stopped / "checkpoints" / "iter_0000010", "--exit-interval", 15)
    train(workspace / "config.yaml", "--run-dir", folder, *load, *layout, ranks=ranks)
    expected, got = training_rows(straight), training_rows(folder)
    assert sorted(got) == list(range(11, 16))
    for iteration, row in got.items():
        assert row["loss"] == pytest.approx(expected[iteration]["loss"], rel=tolerances.LAYOUT_LOSS)


def test_a_killed_save_never_becomes_the_latest(workspace: Path) -> None:
    folder = workspace / "killed"
    checkpoints = folder / "checkpoints"
    words = command(workspace / "config.yaml", *flags(folder, save="checkpoints"), "--save-interval", 1)
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((checkpoints / TRACKER).exists() and list(checkpoints.glob("partial_iter_*/*"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(checkpoints.glob("partial_iter_*"))
    latest = find_checkpoint(checkpoints)
    assert latest is not None
    done = int(latest.name.removeprefix("iter_"))
    stop = ("--exit-interval", done + 1)
    output = train(workspace / "config.yaml", *flags(folder, save="checkpoints", load="checkpoints"), *stop)
    assert f"at iteration {done}" in output
    assert not list(checkpoints.glob("partial_iter_*"))


def write_short_index(folder: Path, prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        content = Path(prefix + suffix).read_bytes()
        (folder / f"short{suffix}").write_bytes(content[:100] if suffix == ".idx" else content)
    return str(folder / "short")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--data-path", "{folder}/missing"], ["{folder}/missing", "preprocess_data.py"]),
        (["--data-path", "{short}"], ["{short}.idx"]),
        (["--tokenizer-model", f"null:{VOCABULARY + 1}"], ["tokenizer", str(VOCABULARY + 1), "--vocab-size"]),
        (["--tensor-model-parallel-size", "2"], ["1 rank(s) cannot hold"]),
        (["--lr", "0"], ["--lr is 0", "greater than 0"]),
        (["--save", "/proc/nowhere"], ["--save /proc/nowhere", "cannot be written"]),
        (["--load", "{stopped}", "--num-layers", "2"], ["another architecture", "num_layers is 4 there, 2 here"]),
        (["--load", "{stopped}", "--optimizer", "adamw"], ["optimizer state of hyperp", "--optimizer hyperp"]),
        (["--load", "{folder}"], ["holds no checkpoint"]),
        (["--save", "{stopped}"], ["already holds checkpoints", "--load {stopped}"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    workspace: Path, stopped: Path, given: list[str], words: list[str]
) -> None:
    places = {
        "folder": str(workspace),
        "stopped": str(stopped / "checkpoints"),
        "short": write_short_index(workspace, str(workspace / "toy")),
    }
    arguments = [word.format(**places) for word in given]
    result = run(workspace / "config.yaml", "--run-dir", workspace / "bad", *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word.format(**places) in lines[0]
    assert not (workspace / "bad" / "metrics.jsonl").exists()


def test_bad_input_ends_every_rank(workspace: Path) -> None:
    started = time.monotonic()
    result = run(workspace / "config.yaml", "--tensor-model-parallel-size", 8, "--run-dir", workspace / "bad", ranks=2)
    assert time.monotonic() - started < 60
    assert "Traceback (most recent call last)" not in result.stderr.split("torch/distributed")[0]
    assert sum("cannot hold tensor x pipeline parallelism" in line for line in result.stderr.splitlines()) == 1


def test_metrics_of_an_earlier_run_are_kept(workspace: Path) -> None:
    folder = workspace / "twice"
    for _ in range(2):
        train(workspace / "config.yaml", "--run-dir", folder, "--train-iters", 1)
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.1.jsonl").read_text().splitlines()] == [1]
    assert sorted(training_rows(folder)) == [1]
