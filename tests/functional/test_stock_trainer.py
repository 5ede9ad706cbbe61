"""Checkpoints of NVIDIA's own trainer, in and out: the same validation loss there, here, and there again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hyperp.convert import megatron_lm
from megatron_hyperp.convert.hyperp import write_weights
from megatron_hyperp.convert.megatron_arguments import flags
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.megatron_compat.versions import Version, megatron_core_version
from tests import tolerances
from tests.commands import run_here
from tests.random_source import RandomSource, model_config
from tests.run_distributed import ROOT, free_port
from tests.toy import EXPERTS, VOCABULARY
from tools import convert_checkpoint, evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        megatron_core_version < Version("0.19"),
        reason=f"megatron.training is in the wheel of megatron-core from 0.19 on; {megatron_core_version} is installed",
    ),
]

LENGTH, WINDOWS = 64, 16
# What the model does not depend on. The last lines are what a machine without CUDA, apex and TransformerEngine needs.
TRAINING = f"""
    --seq-length {LENGTH} --micro-batch-size 4 --global-batch-size 8 --eval-iters {WINDOWS // 8} --eval-interval 100
    --lr 1e-2 --min-lr 1e-3 --lr-decay-style linear --clip-grad 0 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-persist-layer-norm
""".split()
MODEL = f"""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --max-position-embeddings {LENGTH} --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
""".split()
MODELS = {
    # An epsilon that the loss depends on.
    "dense": "--norm-epsilon 0.1",
    "experts": """
        --qk-layernorm --untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2
        --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    """,
}
SECONDS = 300


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two corpora of one document each, so that samples in any order are its windows: one to train on, one to test."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpora")
    prefixes = {}
    for seed, (name, windows) in enumerate({"train": 64, "valid": WINDOWS}.items()):
        random = np.random.default_rng(seed)
        tokens = np.cumsum(random.integers(4, size=windows * LENGTH + 1)) % VOCABULARY
        prefixes[name] = str(folder / name)
        builder = IndexedDatasetBuilder(f"{prefixes[name]}.bin", dtype=np.uint16)
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
        builder.finalize(f"{prefixes[name]}.idx")
    return prefixes


def stock_loss(corpora: dict[str, str], *words: Any) -> float:
    """Run NVIDIA's trainer, and return the validation loss that it ends with."""
    data = [word for part in ("train", "valid") for word in (f"--{part}-data-path", corpora[part])]
    data += ["--test-data-path", corpora["valid"], "--data-cache-path", f"{corpora['train']}-cache"]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    single = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stock_trainer", *TRAINING, *data, *map(str, words)],
        cwd=ROOT,
        env=os.environ | rank | single | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return float(re.findall(r"on validation set \| lm loss value: (\S+)", done.stdout)[-1])


def our_loss(checkpoint: Path, corpora: dict[str, str], capsys: pytest.CaptureFixture[str]) -> float:
    done = run_here(evaluate.main, checkpoint, "--data-path", corpora["valid"], "--json", capsys=capsys)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == WINDOWS * LENGTH
    return float(found["loss"])


def converted(source: Path, target: Path, kinds: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Convert, and return what was printed."""
    names = ("--from", kinds[0], "--to", kinds[1], "--input", source, "--output", target, "--verify")
    done = run_here(convert_checkpoint.main, *names, capsys=capsys)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_model_of_nvidias_trainer_comes_here_and_goes_back(
    model: str, corpora: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    saving = ("--train-iters", 20, "--save", theirs, "--save-interval", 100)
    there = stock_loss(corpora, *MODEL, *model.split(), *saving)
    assert there < 0.95 * np.log(VOCABULARY)
    converted(theirs, ours, ("megatron-lm", "hyperp"), capsys)
    assert our_loss(ours, corpora, capsys) == pytest.approx(there, abs=tolerances.EVALUATED_LOSS)
    said = converted(ours, back, ("hyperp", "megatron-lm"), capsys)
    printed = re.findall(r"^for Megatron-LM's flags (.*)$", said, re.MULTILINE)[0].split()
    again = stock_loss(corpora, *printed, "--train-iters", 1, "--skip-train")
    assert again == pytest.approx(there, abs=tolerances.EVALUATED_LOSS)


@pytest.mark.timeout(2 * SECONDS)
def test_a_model_of_ours_evaluates_the_same_there(
    corpora: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With multipliers on the residual branches and in attention, which are folded into its weights."""
    source = RandomSource(model_config(**EXPERTS, moe_gate="softmax", norm_epsilon=1e-3))
    assert source.config.model.residual_multiplier != 1
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    write_weights(here, source, layout=Layout(), dtype=None, advance=lambda _: None)
    megatron_lm.write(there, source, layout=Layout(), dtype=None, advance=lambda _: None)
    loading = ["--load", there, *flags(source.config).split()]
    found = stock_loss(corpora, *loading, "--train-iters", 1, "--skip-train")
    assert found == pytest.approx(our_loss(here, corpora, capsys), abs=tolerances.EVALUATED_LOSS)
