"""The converter's command line with the trainer: it goes on with imported weights, and with what was cut anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.convert.convert import convert
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.compatibility import check_compatible
from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.functional.launch import ROOT, environment, train, write_config
from tests.integration.test_convert_huggingface import job
from tests.random_source import write_random
from tests.toy import EXPERTS, toy_config, write_corpus

TP2 = ("--tensor-model-parallel-size", 2)
EVERYTHING = {
    **EXPERTS,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
}


def command_line(*flags: Any, fails: bool = False) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "tools/convert_checkpoint.py", *map(str, flags)]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert (result.returncode == 2) == fails, result.stdout + result.stderr
    assert result.returncode in (0, 2)
    return result


def losses(folder: Path) -> dict[int, float]:
    return {row["iteration"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    write_corpus(folder)
    return folder


def test_imported_weights_are_trained_on_their_spheres(workspace: Path) -> None:
    """Export, import with radii from weights, train under TP2, resume on one rank: the import's radii stay."""
    source = write_random(workspace / "ours")
    convert(job(source="hyperp", target="hf", input=workspace / "ours", output=workspace / "hf"))
    start = {"output": workspace / "start", "radius": "from-weights", "layout": Layout(tp=2)}
    convert(job(source="hf", target="hyperp", input=workspace / "hf", **start))
    fields = {"radius": "from-weights", "train_iters": 4}
    config = write_config(toy_config(str(workspace / "toy"), workspace / "run", **fields), workspace / "radii.yaml")
    saved = workspace / "run" / "checkpoints"
    first = train(config, "--load", workspace / "start", "--save", saved, "--exit-interval", 2, *TP2, ranks=2)
    assert "started with the weights of" in first
    assert "at iteration 0" in first
    assert "resumed from" in train(config, "--load", saved, "--save", saved)
    rows = [row for row in read_metrics(workspace / "run") if "loss" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert all(row["radius_drift"] < tolerances.RADIUS_DRIFT for row in rows)
    radii = HyperPSource(saved).extras.radii
    assert radii is not None
    assert radii == HyperPSource(workspace / "start").extras.radii
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert radii[name] == pytest.approx(float(source.read(name).norm()), rel=1e-6)
    other = arguments.load_yaml(config).resolve()
    other.optimizer.radius = "stateless"
    with pytest.raises(UsageError, match="on other spheres: radius is from-weights there, stateless here"):
        check_compatible(saved / "iter_0000004", other)


def test_what_fails_leaves_nothing_behind(workspace: Path) -> None:
    """The second file of two is cut off: found before anything is written."""
    write_random(workspace / "fine")
    out = {"input": workspace / "fine", "output": workspace / "cut"}
    convert(job(source="hyperp", target="hf", shard_bytes=200_000, **out))
    broken = sorted((workspace / "cut").glob("*.safetensors"))[-1]
    os.truncate(broken, broken.stat().st_size - 100)
    before = sorted(path.name for path in workspace.iterdir())
    output = ("--output", workspace / "never")
    result = command_line("--from", "hf", "--to", "hyperp", "--input", workspace / "cut", *output, fails=True)
    [line] = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {broken} is no whole safetensors file (it ends 100 bytes too early)")
    assert sorted(path.name for path in workspace.iterdir()) == before


@pytest.mark.slow
def test_any_layout_of_a_mixture_of_experts(workspace: Path) -> None:
    """Trained under TP2 x PP2 x EP2: exported and verified; cut anew, it goes on as the original does."""
    folder = workspace / "moe"
    config = write_config(toy_config(str(workspace / "toy"), folder, **EVERYTHING, train_iters=8), folder / "c.yaml")
    train(config, "--save", folder / "first", "--save-interval", 2, "--exit-interval", 4, ranks=4)
    out = ("--from", "hyperp", "--to", "hf", "--input", folder / "first", "--output", folder / "hf", "--verify")
    said = command_line(*out).stdout
    assert "71 tensors agree bit for bit" in said
    assert "logits agree with those of transformers" in said
    cut = ("--from", "hyperp", "--to", "hyperp", "--input", folder / "first", "--verify")
    assert "232 tensors of weights and optimizer state agree" in command_line(*cut, "--output", folder / "cut").stdout
    found = {}
    for name in ("first", "cut"):
        there = folder / f"from-{name}"
        train(config, "--load", folder / name, "--run-dir", there, ranks=4)
        found[name] = losses(there)
        one = ("--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1, "--no-sequence-parallel")
        alone = folder / f"alone-{name}"
        train(config, "--load", folder / name, "--run-dir", alone, *one, "--expert-model-parallel-size", 1)
        for iteration, loss in losses(alone).items():
            assert loss == pytest.approx(found["first"][iteration], rel=tolerances.RESHARDED_LOSS)
    assert found["first"] == found["cut"]
    assert sorted(found["first"]) == [5, 6, 7, 8]
    mean = command_line("--average", 2, *cut, "--output", folder / "mean").stdout
    assert "matrices put back on their spheres" in mean
    [name] = [
        name
        for name in HyperPSource(folder / "mean").parameters
        if name.endswith("0.self_attention.linear_proj.weight")
    ]
    weights = [HyperPSource(folder / "first" / f"iter_000000{number}").read(name) for number in (2, 4)]
    average = HyperPSource(folder / "mean").read(name)
    cosine = torch.nn.functional.cosine_similarity(average.flatten(), (weights[0] + weights[1]).flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)
    assert float(average.norm()) == pytest.approx(float(weights[1].norm()), rel=1e-6)
    shutil.rmtree(folder)


MEASURE = """
import resource, sys
sys.argv = sys.argv[1:]
import runpy
try:
    runpy.run_path("tools/convert_checkpoint.py", run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["hf", "hyperp"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, target: str) -> None:
    """Two gigabytes of weights, and then as much from there again, in less than three of memory."""
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 30, "vocab_size": 32000}
    write_random(tmp_path / "big", **sizes)
    total = sum(path.stat().st_size for path in (tmp_path / "big").rglob("*") if path.is_file())
    assert total > 2e9
    for source, output, kind, to in (("big", "out", "hyperp", target), ("out", "back", target, "hyperp")):
        flags = ["--from", kind, "--to", to, "--input", tmp_path / source, "--output", tmp_path / output]
        words = [sys.executable, "-c", MEASURE, "convert_checkpoint.py", *map(str, flags)]
        result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
        peak = 1024 * int(result.stdout.split()[-1])
        print(f"{kind} -> {to}: {total / 1e9:.2f} GB of weights, peak memory {peak / 2**30:.2f} GiB")
        assert peak < 3 * 2**30
        shutil.rmtree(tmp_path / source)
