"""The real entry point: resume bit for bit, load under another layout, survive being killed, refuse bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import ParallelConfig
from megatron_hyperp.errors import UsageError
from megatron_hyperp.planning.checkpoints import checkpoint_bytes
from megatron_hyperp.training import compatibility
from megatron_hyperp.training.checkpoint_folders import TRACKER, find_checkpoint
from megatron_hyperp.training.logging import read_events, read_metrics
from megatron_hyperp.training.saving import drop_old
from tests import tolerances
from tests.functional.launch import ENTRY, ROOT, command, environment, run, train, write_config
from tests.run_distributed import free_port
from tests.toy import VOCABULARY, toy_config, write_corpus
from tools import inspect_checkpoint

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


@pytest.mark.slow
def test_pretrained_weights_fit_any_layout(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    """Weights that two tensor-parallel ranks saved: the losses are the same on one rank and on two pipeline stages."""
    found = []
    for name, layout, ranks in (("one", (), 1), ("stages", PP2, 2)):
        start = ("--pretrained-checkpoint", stopped / "checkpoints", "--train-iters", 2)
        train(workspace / "config.yaml", *flags(tmp_path / name, save=f"{name}-ckpt"), *start, *layout, ranks=ranks)
        found.append([training_rows(tmp_path / name)[iteration]["loss"] for iteration in (1, 2)])
    assert found[0] == pytest.approx(found[1], rel=tolerances.LAYOUT_LOSS)
    assert found[0][0] < training_rows(stopped)[5]["loss"]


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


def test_a_checkpoint_is_as_large_as_planned(straight: Path) -> None:
    """Megatron-Core's random states lie beside the tensors."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    config = arguments.load_yaml(straight / "config.yaml")
    config.parallel = ParallelConfig()
    metadata = FileSystemReader(straight / "checkpoints" / "iter_0000020").read_metadata()
    tensors = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    held = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    assert checkpoint_bytes(config.resolve()) == held


def test_resume_is_bit_for_bit(workspace: Path, straight: Path, stopped: Path) -> None:
    output = train(workspace / "config.yaml", *flags(stopped, save="checkpoints", load="checkpoints"), *TP2, ranks=2)
    assert "at iteration 10" in output
    expected, got = training_rows(straight), training_rows(stopped)
    assert sorted(got) == list(range(1, 21))
    for iteration in range(1, 21):
        for key in ("loss", "grad_norm", "lr", "tokens", "radius_drift"):
            assert got[iteration][key] == expected[iteration][key], (iteration, key)


def test_what_is_written_beside_the_training_is_of_its_iteration(workspace: Path, straight: Path) -> None:
    folder = workspace / "async"
    output = train(
        workspace / "config.yaml",
        *(*flags(folder, save="checkpoints"), "--async-save", "--save-interval", 3, "--log-interval", 1, *TP2),
        ranks=2,
    )
    saves = [3, 6, 9, 12, 15, 18, 20]
    assert [event["iteration"] for event in read_events(folder) if event["kind"] == "saved"] == saves
    lines = output.splitlines()
    [told] = [index for index, line in enumerate(lines) if line.startswith(f"saved {folder}/checkpoints/iter_0000006 ")]
    assert lines[told].endswith(" s of them without training")
    # The steps after the sixth were taken while it was written.
    assert lines.index(next(line for line in lines if line.startswith("iteration 7/20 "))) < told
    load = ("--load", folder / "checkpoints" / "iter_0000006")
    again = workspace / "from-async"
    train(workspace / "config.yaml", "--run-dir", again, *load, *TP2, ranks=2)
    expected, got = training_rows(straight), training_rows(again)
    for iteration in range(7, 21):
        for key in ("loss", "grad_norm", "radius_drift"):
            assert got[iteration][key] == expected[iteration][key], (iteration, key)


@pytest.mark.parametrize(
    ("layout", "ranks"), [((), 1), (PP2, 2), ((), 2), (TP2, 4)], ids=["one rank", "PP2", "DP2", "TP2 x DP2"]
)
def test_another_layout_goes_on(
    workspace: Path, straight: Path, stopped: Path, layout: tuple[Any, ...], ranks: int
) -> None:
    folder = workspace / f"other-{ranks}-{len(layout)}-{'pipeline' in ''.join(map(str, layout))}"
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


def damage_file(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return a function that replaces the named file of a checkpoint, or deletes it."""

    def damage(folder: Path) -> None:
        path = next(folder.glob(name))
        path.unlink() if content is None else path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage_file("__0_0.distcp", b"short"), marks=pytest.mark.slow, id="short shard"),
        pytest.param(damage_file("__0_0.distcp", None), marks=pytest.mark.slow, id="lost shard"),
        pytest.param(damage_file(".metadata", b"\x80"), id="bad metadata"),
        pytest.param(damage_file("metadata.json", b"{"), marks=pytest.mark.slow, id="bad json"),
        pytest.param(damage_file("common.pt", b"no pickle"), marks=pytest.mark.slow, id="bad common state"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    workspace: Path, straight: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "iter_0000020"
    shutil.copytree(straight / "checkpoints" / "iter_0000020", folder)
    damage(folder)
    result = run(workspace / "config.yaml", "--run-dir", tmp_path, "--load", folder, "--train-iters", 30)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"the checkpoint {folder} cannot be read" in result.stderr


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file, behind its back."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("__1_0.distcp", flip_bit, "__1_0.distcp is not what was written"),
        pytest.param("__1_0.distcp", truncate, "__1_0.distcp has ", marks=pytest.mark.slow),
        pytest.param("common.pt", flip_bit, "common.pt is not what was written", marks=pytest.mark.slow),
        pytest.param(
            "checksums.json", lambda path: path.write_bytes(b"{"), "checksums.json is damaged", marks=pytest.mark.slow
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    workspace: Path, straight: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any], told: str
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", checkpoints)
    damage(checkpoints / "iter_0000020" / name)
    back = ("--run-dir", tmp_path, "--save", checkpoints, "--load", checkpoints, *TP2)
    result = run(workspace / "config.yaml", *back, ranks=2)
    assert result.returncode == 0, result.stderr
    [note] = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert note.startswith(f"note: the checkpoint {checkpoints}/iter_0000020 is damaged ({told}")
    assert note.endswith("; going back to iter_0000015")
    expected, got = training_rows(straight), training_rows(tmp_path)
    for iteration in range(16, 21):
        assert got[iteration]["loss"] == expected[iteration]["loss"]
    # The damaged one has been written again.
    assert inspect_checkpoint.main([str(checkpoints), "--verify"]) == 0


def test_without_a_sound_checkpoint_nothing_is_trained(workspace: Path, straight: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", checkpoints)
    for folder in checkpoints.glob("iter_*"):
        flip_bit(folder / "__0_0.distcp")
    result = run(
        workspace / "config.yaml", "--run-dir", tmp_path, "--save", checkpoints, "--load", checkpoints, *TP2, ranks=2
    )
    assert f"the checkpoint {checkpoints}/iter_0000020 cannot be read (__0_0.distcp is not what" in result.stderr
    assert "and there is no sound one before it; name another" in result.stderr
    assert inspect_checkpoint.main([str(checkpoints), "--verify"]) == 1


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.proof)],)


def hostile_metadata(folder: Path, proof: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(proof)))


def hostile_object(folder: Path, proof: Path) -> None:
    """Put one in the place of the random states."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
    info = metadata.storage_data[index]
    stream = io.BytesIO()
    torch.save(Hostile(proof), stream)
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(stream.getvalue())
        file.write(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("plant", [pytest.param(hostile_metadata, marks=pytest.mark.slow), hostile_object])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    workspace: Path, straight: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    folder, proof = tmp_path / "iter_0000020", tmp_path / "proof"
    shutil.copytree(straight / "checkpoints" / "iter_0000020", folder)
    plant(folder, proof)
    result = run(workspace / "config.yaml", "--run-dir", tmp_path, "--load", folder, "--train-iters", 30, *TP2, ranks=2)
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]
    assert f"the checkpoint {folder} cannot be read" in result.stderr
    assert result.returncode == 2
    assert not proof.exists()


@pytest.mark.parametrize("tracker", [b"\xff\xfe", "²".encode(), b"", b"7"])
def test_a_damaged_tracker_names_what_is_there(straight: Path, tmp_path: Path, tracker: bytes) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / TRACKER).write_bytes(tracker)
    with pytest.raises(UsageError, match="complete ones there: iter_0000015, iter_0000020; name one"):
        find_checkpoint(tmp_path / "checkpoints")


def test_going_back_never_deletes_the_new_checkpoint(workspace: Path, straight: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", checkpoints)
    back = ("--load", checkpoints / "iter_0000015", "--run-dir", tmp_path, "--exit-interval", 16, "--keep", 1)
    result = run(workspace / "config.yaml", *back, "--save", checkpoints)
    assert result.returncode == 2
    assert "already holds checkpoints up to iter_0000020" in result.stderr
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000015", "iter_0000020", TRACKER}
    drop_old(checkpoints, keep=1, latest=15)
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000015", "iter_0000020", TRACKER}
    drop_old(checkpoints, keep=1, latest=20)
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000020", TRACKER}


def test_a_folder_that_not_all_ranks_share_is_one_line(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    """Rank 1 gets another working folder, in which the relative --load is empty."""
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank1").mkdir()
    shutil.copytree(stopped / "checkpoints", tmp_path / "rank0" / "checkpoints")
    port, words = free_port(), command(workspace / "config.yaml", "--save", "checkpoints", "--load", "checkpoints")
    words = [str(ROOT / word) if word == ENTRY else word for word in words]
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**environment(), **{name: str(value) for name, value in place.items()}}
        ranks.append(
            subprocess.Popen(words, cwd=tmp_path / f"rank{rank}", env=variables, stderr=subprocess.PIPE, text=True)
        )
    _, message = ranks[0].communicate(timeout=100)
    ranks[1].communicate(timeout=100)
    assert [process.returncode for process in ranks] == [2, 2]
    assert re.search(r"^error: rank 0 has checkpoint iter_00000[12]0, and rank 1 none; ", message, re.MULTILINE)


def test_changed_settings_are_told(straight: Path, workspace: Path) -> None:
    folder = straight / "checkpoints" / "iter_0000020"
    config = arguments.load_yaml(workspace / "config.yaml").resolve()
    config.training.seed, config.optimizer.clip_grad, config.optimizer.adam_eps = 7, 0.5, 1e-6
    config.training.micro_batch_size, config.data.num_workers = 4, 3
    assert compatibility.changed_settings(folder, config) == [
        "clip_grad was 1.0 in the checkpoint and is now 0.5",
        "adam_eps was 1e-08 in the checkpoint and is now 1e-06",
        "seed was 1234 in the checkpoint and is now 7",
        "the order of the data may differ from here on",
    ]


def test_gradients_that_stay_non_finite_end_the_run(workspace: Path, tmp_path: Path) -> None:
    """An absurd scale overflows the forward pass; a data-loading process does not delay the end."""
    flags = ("--run-dir", tmp_path, "--softmax-scale", "1e38", "--train-iters", 60, "--save", tmp_path / "checkpoints")
    result = run(workspace / "config.yaml", *flags, "--num-workers", 1, timeout=100)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "20 steps in a row had a non-finite gradient" in result.stderr
    assert not list((tmp_path / "checkpoints").glob("iter_*"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] > 0
    assert rows[-1]["grad_norm"] is None


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
        (["--load", "{stopped}", "--radius-scale", "2"], ["other spheres: radius_scale is 1.0 there, 2.0 here"]),
        (["--load", "{folder}"], ["holds no checkpoint"]),
        (["--tensorboard-dir", "/proc/nowhere"], ["--tensorboard-dir /proc/nowhere", "cannot be written"]),
        (["--async-save"], ["--async-save", "--save"]),
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
