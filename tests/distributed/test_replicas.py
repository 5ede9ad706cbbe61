"""A bit that flips on one rank is found by comparing replicas, and named; nothing is found where nothing flipped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, toy_config

TP2 = {"tensor_model_parallel_size": 2}
TP2SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
TIED = {"untie_embeddings_and_output_weights": False}
EP2 = {**EXPERTS, "expert_model_parallel_size": 2}
# In place of a rank: all that hold the tensor.
ANY = -1
# A rank that owns what flips says so itself.
MASTER = (
    r"^rank {} on \S+ uses weights that its fp32 master of {} does not have, found in iteration 2; nothing of it was"
)
NORM = "decoder.layers.1.pre_mlp_layernorm.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"
EXPERT = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
GAIN = "decoder.layers.0.self_attention.q_layernorm.weight"


@dataclass(frozen=True)
class Flip:
    """One bit on one rank, in the forward and backward pass of an iteration; or, on no rank, none."""

    layout: dict[str, Any]
    rank: int | None = None
    name: str = QKV
    iteration: int = 2
    part: str = "weight"
    settings: dict[str, Any] = field(default_factory=dict)


def flip(tensor: torch.Tensor) -> None:
    """Change the highest bit of one mantissa in the middle."""
    flat = tensor.data.view(-1).view(torch.uint8)
    flat[4 * (tensor.numel() // 2) + 2] ^= 0x40


def plant(trainer: Any, planted: Flip) -> None:
    """Let a bit flip after the backward pass of an iteration."""
    original = trainer._train_batch

    def batch_and_flip(batches: Any) -> Any:
        losses = original(batches)
        if planted.rank in (trainer.rank, ANY) and trainer.progress.iteration + 1 == planted.iteration:
            if planted.part == "weight":
                found = [
                    entry.parameter
                    for d in trainer.optimizer.domains
                    for entry in d.routes
                    if entry.name == planted.name
                ]
            else:
                found = [
                    family.tensors()[planted.part][index]
                    for family in trainer.optimizer.families
                    for index, entry in enumerate(family.routes)
                    if entry.name == planted.name
                ]
            # Only the owner has the state.
            for tensor in found:
                flip(tensor)
        return losses

    trainer._train_batch = batch_and_flip


def outcomes(prefix: str, folder: str, world_size: int, flips: list[Flip]) -> list[str | None]:
    """Train once for each flip; return what stopped each training."""
    from megatron.core import parallel_state

    from megatron_hyperp import device
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.errors import UsageError
    from megatron_hyperp.training.loop import Trainer

    device.adapt_megatron()
    device.init_process_group(2)
    told: list[str | None] = []
    for number, planted in enumerate(flips):
        run = Path(folder) / str(number)
        run.mkdir(exist_ok=True)
        common = {"num_layers": 2, "train_iters": 4, "check_weight_hash_across_dp_replicas_interval": 2}
        config = toy_config(prefix, run, **{**common, **planted.layout, **planted.settings})
        trainer = Trainer(
            config.resolve(world_size=world_size), load_tokenizer(config.data.tokenizer_model or ""), None
        )
        plant(trainer, planted)
        try:
            trainer.train()
            told.append(None)
        except UsageError as error:
            told.append(str(error) if error.same_on_all_ranks else f"on this rank alone: {error}")
        trainer.close_reports()
        parallel_state.destroy_model_parallel()
    return told


def test_one_bit_on_two_ranks(corpus: str, tmp_path: Path) -> None:
    cases = [
        (Flip({}, 1), rf"ranks 0 on \S+, 1 on \S+ hold different bits of {QKV}, found in iteration 2; nothing"),
        (Flip(TP2, 1, NORM), MASTER.format(1, NORM)),
        (Flip(TP2SP, 0, GAIN), MASTER.format(0, GAIN)),
        (Flip({**TP2SP, **EXPERTS}, 1, ROUTER), MASTER.format(1, ROUTER)),
        # The momentum of a replicated gain, after a step that is not compared: it stays different.
        (Flip(TP2SP, 1, NORM, 3, "exp_avg"), rf"hold different bits of {NORM}.*, found in iteration 4"),
        (Flip({}, ANY, QKV, 2, "master"), rf"^rank [01] on \S+ uses weights that its fp32 master of {QKV} does not"),
        (Flip({**PP2, **TIED}, 1, "output_layer.weight"), "uses weights that its fp32 master|the tied embedding"),
        (Flip(EXPERTS, 1, EXPERT), rf"of {EXPERT}( does not have)?, found in iteration 2"),
        # Nothing is compared in iteration 1, but before the save, where the update has mended the weights.
        (Flip({}, 1, QKV, 1), None),
    ]
    compare(cases, run_distributed(outcomes, 2, corpus, str(tmp_path), 2, [case for case, _ in cases]))


def compare(cases: list[tuple[Flip, str | None]], ranks: list[list[str | None]]) -> None:
    """Every rank stops with the same line, which matches what is expected; None: it trains to the end."""
    for place, (case, expected) in enumerate(cases):
        (line,) = {told[place] for told in ranks}
        assert (line is None) if expected is None else re.search(expected, line or ""), (case, line)


@pytest.mark.slow
def test_the_majority_of_four_ranks_names_the_odd_one(corpus: str, tmp_path: Path) -> None:
    cases: list[tuple[Flip, str | None]] = [
        (Flip({}, 1), rf"^rank 1 on \S+ holds other bits of {QKV} than ranks 0, 2, 3, found in iteration 2; nothing"),
        (Flip(TP2SP, 1, NORM), rf"^rank 1 on \S+ holds other bits of {NORM} than ranks 0, 2, 3, found"),
        (
            Flip({**EP2, "micro_batch_size": 4}, 3, EXPERT),
            rf"^ranks 1 on \S+, 3 on \S+ hold different bits of {EXPERT}, found",
        ),
        (Flip({**PP2, **TIED, **TP2SP}), None),
        (Flip({**PP2, **EXPERTS, "num_virtual_stages_per_pipeline_rank": 2, "num_layers": 4}), None),
    ]
    compare(cases, run_distributed(outcomes, 4, corpus, str(tmp_path), 4, [case for case, _ in cases]))
