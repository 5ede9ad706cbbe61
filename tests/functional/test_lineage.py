"""Runs that start from checkpoints of others: reports of their own, a parent on record, weights alone if asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments, device
from megatron_hyperp.convert import convert
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import preflight
from megatron_hyperp.training.checkpointing import common_state
from megatron_hyperp.training.compatibility import weights_notes
from megatron_hyperp.training.logging import TensorBoard, WeightsAndBiases, read_events, read_metrics
from tests import fake_wandb
from tests.fake_wandb import FakeRun
from tests.toy import toy_config, write_corpus

SMALL = {"num_layers": 1, "train_iters": 4, "wandb_project": "test", "quiet": True, "heartbeat_interval": 0.0}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    device.adapt_megatron()
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=300)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    monkeypatch.delenv("RANK", raising=False)
    return fake_wandb.install(monkeypatch)


@pytest.fixture(scope="module")
def saved(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of one iteration."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        train(prefix, folder, save=folder / "ckpt", train_iters=1, wandb_project=None)
    return folder / "ckpt"


def train(prefix: str, run_dir: Path, **overrides: Any) -> None:
    from megatron_hyperp.training.pretrain import pretrain

    places = {name: str(value) for name, value in overrides.items() if isinstance(value, Path)}
    assert pretrain(toy_config(prefix, run_dir, **{**SMALL, **overrides, **places}), world_size=1) == 0


def losses(run_dir: Path) -> dict[int, float]:
    return {row["iteration"]: row["loss"] for row in read_metrics(run_dir) if "loss" in row}


def test_a_branch_reports_to_a_run_of_its_own(prefix: str, runs: dict[str, FakeRun], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train(prefix, a, save=a / "ckpt", exit_interval=2)
    assert list(runs) == ["run0"]
    checkpoint = a / "ckpt" / "iter_0000002"

    # A branch, killed before its first checkpoint and started again: one run, not the parent's.
    train(prefix, b, load=a / "ckpt", save=b / "ckpt", exit_interval=3)
    shutil.rmtree(b / "ckpt")
    train(prefix, b, load=a / "ckpt", save=b / "ckpt", exit_interval=3)
    assert list(runs) == ["run0", "run1"]
    parent = {"checkpoint": str(checkpoint), "iteration": 2, "run_dir": str(a), "wandb_run_id": "run0"}
    assert [start["config"]["parent"] for start in runs["run1"].starts] == [parent, parent]
    assert runs["run0"].steps == [1, 2]

    # Its resumption and the parent's: each in its own run, with the parent still on record.
    train(prefix, b, load=b / "ckpt", save=b / "ckpt")
    train(prefix, a, load=a / "ckpt", save=a / "ckpt")
    assert list(runs) == ["run0", "run1"]
    assert runs["run1"].starts[-1]["config"]["parent"] == parent
    assert common_state(b / "ckpt" / "iter_0000004")["parent"] == parent
    assert "parent" not in runs["run0"].starts[-1]["config"]
    assert (runs["run0"].steps, runs["run1"].steps) == ([1, 2, 3, 4], [3, 3, 4])
    assert (sorted(losses(a)), sorted(losses(b))) == ([1, 2, 3, 4], [3, 4])

    # A copy of the run folder is a branch as well.
    shutil.copytree(a, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "ckpt" / "iter_0000004")
    (tmp_path / "c" / "ckpt" / "latest_checkpointed_iteration.txt").unlink()
    train(prefix, tmp_path / "c", load=tmp_path / "c" / "ckpt", save=tmp_path / "c" / "ckpt", **{"exit_interval": 3})
    assert list(runs) == ["run0", "run1", "run2"]


def test_a_branch_in_the_run_folder_of_its_parent(prefix: str, runs: dict[str, FakeRun], tmp_path: Path) -> None:
    """As with the default --run-dir: another --save makes another run, whose metrics are apart from the parent's."""
    folder = tmp_path / "run"
    train(prefix, folder, save=tmp_path / "a", exit_interval=2)
    train(prefix, folder, load=tmp_path / "a", save=tmp_path / "b", exit_interval=3)
    assert list(runs) == ["run0", "run1"]
    assert sorted(losses(folder)) == [3]
    assert len((folder / "metrics.1.jsonl").read_text().splitlines()) == 2
    train(prefix, folder, load=tmp_path / "a", save=tmp_path / "a")
    assert list(runs) == ["run0", "run1"]
    assert runs["run0"].steps == [1, 2, 3, 4]
    assert sorted(losses(folder)) == [3, 4]
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.2.jsonl").read_text().splitlines()] == [3]


def test_a_branch_does_not_write_its_parents_tensorboard(
    prefix: str, runs: dict[str, FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, board = tmp_path / "a", tmp_path / "tensorboard"
    purged: list[int | None] = []

    monkeypatch.setattr(TensorBoard, "__init__", lambda self, folder, purge_step=None: purged.append(purge_step))
    monkeypatch.setattr(TensorBoard, "write", lambda self, row: None)
    monkeypatch.setattr(TensorBoard, "close", lambda self: None)
    train(prefix, a, save=a / "ckpt", exit_interval=2, tensorboard_dir=board)
    b = tmp_path / "b"
    with pytest.raises(
        UsageError, match=r"--tensorboard-dir .* holds the events of the run that wrote .*another --tens"
    ):
        train(prefix, b, load=a / "ckpt", save=b / "ckpt", tensorboard_dir=board)
    with pytest.raises(UsageError, match="--tensorboard-dir"):
        train(prefix, b, pretrained_checkpoint=a / "ckpt", save=b / "ckpt", tensorboard_dir=board)
    train(prefix, a, load=a / "ckpt", save=a / "ckpt", tensorboard_dir=board)
    # What a resumed run writes again takes the place of what is there.
    assert purged == [None, 3]


@pytest.mark.parametrize(
    ("variables", "given", "kept"),
    [
        ({}, {"id": "ours", "resume": "allow", "name": "run", "dir": "{run}"}, {}),
        ({"WANDB_RUN_ID": "theirs"}, {"resume": "allow"}, {"id"}),
        ({"WANDB_RUN_ID": "theirs", "WANDB_RESUME": "must"}, {}, {"id", "resume"}),
        ({"WANDB_FORK_FROM": "theirs?_step=5"}, {}, {"id", "resume"}),
        ({"WANDB_NAME": "theirs", "WANDB_DIR": "/tmp"}, {"id": "ours"}, {"name", "dir"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_environment_comes_before_our_choice(
    runs: dict[str, FakeRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    given: dict[str, str],
    kept: set[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    service = WeightsAndBiases(toy_config("data", tmp_path / "run", wandb_project="test"), "ours", None)
    [start] = runs[service.run_id].starts
    assert service.run_id == variables.get("WANDB_RUN_ID", "ours" if "id" in start else "run0")
    assert {name: start[name] for name in given} == {name: v.format(run=tmp_path / "run") for name, v in given.items()}
    assert not kept & start.keys()


def test_pretrained_weights_start_a_run_that_is_requeued_safely(
    prefix: str, runs: dict[str, FakeRun], tmp_path: Path
) -> None:
    """Weights alone, at iteration 0, as from a converted checkpoint; then the run's own checkpoints, to the bit."""
    a = tmp_path / "a"
    train(prefix, a, save=a / "ckpt", exit_interval=2)
    job = convert.Job(
        **{"source": "hyperp", "target": "hyperp", "input": str(a / "ckpt"), "output": str(tmp_path / "imported")},
        **{"layout": Layout(), "dtype": None, "shard_bytes": None, "tokenizer": None, "radius": "stateless"},
        **{"average": None, "weights_only": True, "verify": False},
    )
    convert.convert(job, say=lambda _: None)
    train(prefix, tmp_path / "straight", load=tmp_path / "imported", seed=7)

    b = tmp_path / "b"
    branch = {"pretrained_checkpoint": a / "ckpt", "save": b / "ckpt", "seed": 7}
    for number in (1, 3, 4):  # the same command line each time, as a requeued job has it
        train(prefix, b, **branch, exit_interval=number)
    assert losses(b) == losses(tmp_path / "straight")
    assert sorted(losses(b)) == [1, 2, 3, 4]
    messages = [(event["iteration"], event["kind"], event["message"]) for event in read_events(b)]
    assert [each for each in messages if each[1] != "saved"] == [
        (0, "started", f"with the weights of {a}/ckpt/iter_0000002 (of the run in {a})"),
        (1, "resumed", f"from {b}/ckpt/iter_0000001"),
        (3, "resumed", f"from {b}/ckpt/iter_0000003"),
    ]
    assert list(runs) == ["run0", "run1", "run2"]
    assert common_state(b / "ckpt" / "iter_0000004")["parent"]["checkpoint"] == str(a / "ckpt" / "iter_0000002")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"pretrained_checkpoint": "{there}/none"},
            "--pretrained-checkpoint .*/none holds no checkpoint; give a folder",
        ),
        ({"pretrained_checkpoint": "{there}", "num_layers": 2}, "another architecture: num_layers is 1 there, 2 here"),
        (
            {"pretrained_checkpoint": "{there}", "radius_scale": 2.0},
            "other spheres: radius_scale is 1.0 there, 2.0 here",
        ),
        (
            {"pretrained_checkpoint": "{there}", "radius": "from-weights"},
            "radius is stateless there, from-weights here",
        ),
        ({"radius": "from-weights"}, "--radius from-weights needs --load or --pretrained-checkpoint of a checkpoint"),
        ({"pretrained_checkpoint": "{there}", "save": "{there}"}, "is the --save folder too; leave it out to resume"),
        ({"pretrained_checkpoint": "{there}", "load": "{there}"}, "is the --load folder too; leave it out to resume"),
    ],
)
def test_what_no_run_can_start_from_is_refused(
    prefix: str, saved: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    given = {name: value.format(there=saved) if isinstance(value, str) else value for name, value in overrides.items()}
    with pytest.raises(UsageError, match=message):
        preflight.check(toy_config(prefix, tmp_path / "run", **SMALL | given), 1)


def test_weights_from_off_the_spheres_are_told(saved: Path) -> None:
    config = arguments.load_yaml(saved / "iter_0000001" / "config.yaml")
    assert weights_notes(saved / "iter_0000001", config) == []
    config.optimizer.optimizer = "muon"
    (saved / "iter_0000001" / "config.yaml").write_text(arguments.to_yaml(config))
    config.optimizer.optimizer = "hyperp"
    [line] = weights_notes(saved / "iter_0000001", config)
    assert line.startswith("the matrices of muon in the checkpoint are scaled to the radii of hyperp; to keep")
    config.optimizer.radius = "from-weights"
    assert weights_notes(saved / "iter_0000001", config) == []
