"""The knobs of the distributed optimizer: flags and YAML, what a checkpoint refuses, what this machine cannot run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments, device
from megatron_hyperp.config import Config
from megatron_hyperp.errors import EXIT_USAGE, UsageError
from megatron_hyperp.optim.products import check_backend
from megatron_hyperp.training import compatibility, preflight
from megatron_hyperp.training.logging import CONFIG_FILE
from tests.commands import run_here

SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --vocab-size 64 --seq-length 16"
    " --global-batch-size 8 --train-iters 20"
)


def parse(flags: str) -> Config:
    return arguments.parse(flags.split(), description="")


def get(config: Config, section: str, name: str) -> Any:
    return getattr(getattr(config, section), name)


# Flags, the field they set, and its value; the first of each field is its default.
KNOBS = [
    ("", "parallel", "overlap_grad_reduce", None),
    ("--overlap-grad-reduce", "parallel", "overlap_grad_reduce", True),
    ("--no-overlap-grad-reduce", "parallel", "overlap_grad_reduce", False),
    ("", "parallel", "overlap_param_gather", None),
    ("--overlap-param-gather", "parallel", "overlap_param_gather", True),
    ("--no-overlap-param-gather", "parallel", "overlap_param_gather", False),
    ("", "parallel", "ddp_bucket_size", None),
    ("--ddp-bucket-size 4e7", "parallel", "ddp_bucket_size", 40_000_000),
    ("", "optimizer", "momentum_dtype", "fp32"),
    ("--momentum-dtype bf16", "optimizer", "momentum_dtype", "bf16"),
    ("", "optimizer", "matrix_split", "fused"),
    ("--matrix-split component", "optimizer", "matrix_split", "component"),
    ("--matrix-split head", "optimizer", "matrix_split", "head"),
    ("", "optimizer", "ns_backend", "torch"),
    ("--ns-backend quack", "optimizer", "ns_backend", "quack"),
]


@pytest.mark.parametrize(("flags", "section", "name", "value"), KNOBS)
def test_flags_set_them_and_yaml_keeps_them(flags: str, section: str, name: str, value: Any, tmp_path: Path) -> None:
    config = parse(f"{SMALL} {flags}").resolve()
    assert get(config, section, name) == value
    path = tmp_path / "config.yaml"
    path.write_text(arguments.to_yaml(config))
    again = arguments.load_yaml(path)
    assert get(again, section, name) == value
    assert again.resolve() == config


@pytest.mark.parametrize(("flags", "section", "name", "value"), [knob for knob in KNOBS if knob[0]])
def test_yaml_sets_them(flags: str, section: str, name: str, value: Any) -> None:
    assert get(arguments.from_dict({section: {name: value}}, source="test"), section, name) == value


def test_an_unset_overlap_may_be_written_as_null() -> None:
    given = {"parallel": {"overlap_grad_reduce": None, "overlap_param_gather": None}}
    assert arguments.from_dict(given, source="test") == Config()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": {"momentum_dtype": "fp16"}}, "momentum_dtype is 'fp16'; allowed are fp32, bf16"),
        ({"optimizer": {"matrix_split": "heads"}}, "matrix_split is 'heads'; allowed are fused, component, head"),
        ({"optimizer": {"ns_backend": "triton"}}, "ns_backend is 'triton'; allowed are torch, quack"),
        ({"parallel": {"overlap_grad_reduce": "yes"}}, "overlap_grad_reduce is 'yes'; it must be true or false"),
        ({"parallel": {"overlap_param_gather": 1}}, "overlap_param_gather is 1; it must be true or false"),
        ({"parallel": {"ddp_bucket_size": "all"}}, "ddp_bucket_size is 'all'; it must be an integer"),
    ],
)
def test_other_values_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        arguments.from_dict(given, source="test")


def test_a_negative_bucket_size_is_refused() -> None:
    with pytest.raises(UsageError, match="--ddp-bucket-size is -1; it must be greater than 0"):
        parse(f"{SMALL} --ddp-bucket-size=-1").resolve()


# Checkpoints


def checkpoint_of(folder: Path, flags: str) -> Path:
    """A checkpoint's folder, as far as its config goes."""
    (folder / CONFIG_FILE).write_text(arguments.to_yaml(parse(f"{SMALL} {flags}").resolve()))
    return folder


def check(folder: Path, flags: str) -> None:
    compatibility.check_compatible(folder, parse(f"{SMALL} {flags}").resolve())


@pytest.mark.parametrize("optimizer", ["hyperp", "muonh"])
@pytest.mark.parametrize(("there", "here"), [("fused", "component"), ("component", "head"), ("head", "fused")])
def test_a_checkpoint_with_another_split_is_refused(tmp_path: Path, optimizer: str, there: str, here: str) -> None:
    folder = checkpoint_of(tmp_path, f"--optimizer {optimizer} --matrix-split {there}")
    with pytest.raises(UsageError) as caught:
        check(folder, f"--optimizer {optimizer} --matrix-split {here}")
    assert str(caught.value) == (
        f"the checkpoint {folder} has its weights on other spheres: matrix_split is {there} there, {here} here;"
        " give its values"
    )
    assert caught.value.same_on_all_ranks
    check(folder, f"--optimizer {optimizer} --matrix-split {there}")


def test_off_the_sphere_another_split_is_only_told(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path, "--optimizer muon")
    check(folder, "--optimizer muon --matrix-split head")
    now = parse(f"{SMALL} --optimizer muon --matrix-split head").resolve()
    assert compatibility.changed_settings(folder, now) == ["matrix_split was fused in the checkpoint and is now head"]


def test_how_ranks_share_work_is_no_change_of_course(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path, "")
    elsewhere = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000 --ns-backend quack"
    check(folder, elsewhere)
    assert compatibility.changed_settings(folder, parse(f"{SMALL} {elsewhere}").resolve()) == []
    rounded = parse(f"{SMALL} --momentum-dtype bf16").resolve()
    assert compatibility.changed_settings(folder, rounded) == [
        "momentum_dtype was fp32 in the checkpoint and is now bf16"
    ]


# Kernels that this machine lacks


def test_quack_without_cuda_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "compute_capability", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    check_backend.cache_clear()
    given = f"{SMALL} --tokenizer-model null:64 --data-path {tmp_path}/nowhere --run-dir {tmp_path}/run"

    def main(words: list[str]) -> None:
        preflight.check(arguments.parse(words, description=""), world_size=1)

    done = run_here(main, *given.split(), "--ns-backend", "quack", capsys=capsys)
    assert done.returncode == EXIT_USAGE
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --ns-backend quack: backend 'quack' needs a CUDA device")
    assert line.endswith("or take backend 'torch'")
    assert not list(tmp_path.iterdir())
    # The same without it goes on to the data.
    with pytest.raises(UsageError, match=r"nowhere\.(idx|bin)"):
        main(given.split())
