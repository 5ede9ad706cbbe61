"""What a run says of itself, through the real entry point: alarms, summary, profile, a logging service that dies."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_hyperp.training.logging import read_events, read_metrics
from tests.functional.launch import ROOT, command, environment, run, train, write_config
from tests.toy import toy_config


@pytest.fixture(scope="module")
def workspace(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    overrides = {"num_layers": 1, "train_iters": 6, "eval_interval": 3, "eval_iters": 1, "stability_interval": 2}
    write_config(toy_config(corpus, folder / "unused", **overrides), folder / "config.yaml")
    return folder


def test_a_quiet_run_prints_alarms_and_the_summary(workspace: Path) -> None:
    folder = workspace / "quiet"
    output = train(
        workspace / "config.yaml",
        *("--run-dir", folder, "--save", folder / "checkpoints", "--quiet", "--profile", "2:3"),
        *("--alarm", "attention_z > 0: save", "loss > 1e6: stop"),
    )
    lines = output.strip().split("\n")
    assert [line.split(" is ")[0] for line in lines[:3]] == ["alarm: attention_z"] * 3
    assert lines[3] == "stopped at iteration 6 of 6"
    assert lines[4].startswith("best held-out loss ")
    assert lines[5].startswith("time: ")
    assert "forward-backward" in lines[5]
    assert lines[6].startswith(f"files: {folder}/metrics.jsonl, {folder}/events.jsonl, {folder}/config.yaml")
    assert len(lines) == 7
    # Iterations 2, 4 and 6 are watched, and each sets the alarm off.
    events = [(event["iteration"], event["kind"]) for event in read_events(folder)]
    assert events == [(i, kind) for i in (2, 4, 6) for kind in ("alarm", "saved")]
    assert sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))[0] == "iter_0000002"
    operations = json.loads((folder / "profile" / "rank0.json").read_text())
    assert len(operations) == 30
    assert operations[0]["self_ms"] >= operations[1]["self_ms"] > 0
    trace = json.loads((folder / "profile" / "rank0.trace.json").read_text())
    assert trace["traceEvents"]


def test_an_alarm_stops_all_ranks_after_saving(workspace: Path) -> None:
    folder = workspace / "stopped"
    output = train(
        workspace / "config.yaml",
        *("--run-dir", folder, "--save", folder / "checkpoints", "--alarm", "grad_norm > 0", "eval_loss > 0: stop"),
        ranks=2,
    )
    # Held-out losses are taken at iteration 3; before that the other alarm only warns, once an iteration.
    assert [event["message"].split()[1] for event in read_events(folder)[:4]] == [*3 * ["grad_norm"], "eval_loss"]
    assert "alarm: grad_norm is " in output
    assert "stopped at iteration 3 of 6" in output
    assert (folder / "checkpoints" / "iter_0000003").is_dir()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alarm", "los > 3"), "there is no metric los"),
        (("--profile", "5"), "--profile is '5'; give FIRST:LAST"),
        (("--profile", "7:9"), "--profile 7:9 begins after the last of 6 iterations"),
        (("--profile", "2:3", "--profile-ranks", "0", "1"), "--profile-ranks 1 is no rank of this job"),
        (("--alarm", "loss > 3: save"), "--alarm 'loss > 3: save' needs --save"),
    ],
)
def test_bad_wishes_are_one_line(workspace: Path, flags: tuple[str, ...], words: str) -> None:
    result = run(workspace / "config.yaml", "--run-dir", workspace / "refused", *flags)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_killed_wandb_leaves_the_training_undisturbed(workspace: Path) -> None:
    folder = workspace / "wandb"
    words = command(
        workspace / "config.yaml",
        *("--run-dir", folder, "--wandb-project", "test", "--train-iters", 60, "--eval-interval", 0),
    )
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 200
        while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        before = len(read_metrics(folder))
        children = psutil.Process(process.pid).children(recursive=True)
        services = [child for child in children if "wandb" in " ".join(child.cmdline())]
        assert services
        for service in services:
            service.kill()
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()[-3000:]
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert before < len(rows) == 60
