"""Weights that travel in FP8: the same training as without, bit for bit, for half the bytes.

On two data-parallel ranks: sums of two do not depend on the order, which other buckets may change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hyperp.convert.storage import CheckpointReader
from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, rows_of_run, toy_config, trained

RANKS = 4
FP8 = {"fp8_format": "hybrid", "fp8_emulation": True, "bf16": True}
# Replicas are compared with each other and with their masters, in each step.
CHECKED = {"check_weight_hash_across_dp_replicas_interval": 1}
RUN = {**FP8, **CHECKED, "train_iters": 3, "micro_batch_size": 4, "global_batch_size": 8, "quiet": True}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[str, dict[str, Any]] = {
    "PP2": {**RUN, **PP2},
    "PP2, experts, sphere": {**RUN, **PP2, **EXPERTS, "fp8_weight_scale": "sphere"},
    "PP2, overlapping, first and last layer in bf16": {
        **RUN,
        **PP2,
        "overlap_param_gather": True,
        "ddp_bucket_size": 20_000,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    },
    "TP2, matrices cut by rows": {**RUN, **TP2, "optimizer": "adamw", "lr": 0.003},
    "TP2, EP2": {**RUN, **TP2, **EXPERTS, "expert_model_parallel_size": 2},
    "TP2, experts as well": {**RUN, **TP2, **EXPERTS, "expert_tensor_parallel_size": 2},
}
# Runs with checkpoints; ``save`` and ``load`` are folders beside theirs.
GATHERED = {**RUN, **PP2, "train_iters": 4, "fp8_param_gather": True}
WHOLE_RUNS: dict[str, dict[str, Any]] = {
    "without": {**GATHERED, "fp8_param_gather": False, "exit_interval": 2, "save": "saved-without"},
    "first": {**GATHERED, "exit_interval": 2, "save": "saved"},
    "second": {**GATHERED, "load": "saved"},
    "whole": {**GATHERED, "save": "saved-whole", "save_interval": 2},
}


# What came of a training on one rank.
Found = dict[str, Any]


class Sent:
    """Counts the bytes of weights that this rank sends, by dtype, from here on."""

    def __init__(self) -> None:
        self.bytes = {torch.uint8: 0, torch.bfloat16: 0}
        self._gather = dist.all_gather_into_tensor
        dist.all_gather_into_tensor = self

    def __call__(self, whole: torch.Tensor, part: torch.Tensor, **named: Any) -> Any:
        if part.dtype in self.bytes:
            self.bytes[part.dtype] += part.nbytes
        return self._gather(whole, part, **named)

    def stop(self) -> None:
        dist.all_gather_into_tensor = self._gather


def run(prefix: str, folder: str, title: str, gather: bool) -> Found:
    from megatron_hyperp import device
    from megatron_hyperp.parameters import named_parameters

    device.adapt_megatron()
    device.init_process_group(2)
    sent = Sent()
    trainer, rows = trained(toy_config(prefix, Path(folder), fp8_param_gather=gather, **CASES[title]))
    trainer.optimizer.exchange.finish_param_sync()
    sent.stop()
    named = [pair for chunk in trainer.chunks for pair in named_parameters(chunk)]
    return {
        "rows": [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows],
        "bytes": (sent.bytes[torch.uint8], sent.bytes[torch.bfloat16]),
        "weights": {name: parameter.detach().clone() for name, parameter in named},
        "masters": [family.master.clone() for family in trainer.optimizer.families],
    }


@pytest.fixture(scope="module")
def found(cases: Callable[..., Cases], corpus: str) -> Cases:
    """What came of a case on each rank, by its title and whether weights travelled in FP8."""
    return cases(lambda key, folder: run_distributed(run, RANKS, corpus, str(folder), *key))


def both(found: Cases, title: str) -> list[tuple[Found, Found]]:
    """The results of each rank, without and with weights that travel in FP8."""
    return list(zip(found[title, False], found[title, True], strict=True))


KEPT = {"PP2", "TP2, EP2"}


@pytest.mark.parametrize("title", kept(CASES, KEPT))
def test_training_is_the_same_bit_for_bit(title: str, found: Cases) -> None:
    for plain, gathered in both(found, title):
        assert gathered["rows"] == plain["rows"]
        assert all(map(torch.equal, gathered["masters"], plain["masters"]))


@pytest.mark.parametrize("title", kept(CASES, KEPT))
def test_weights_of_fp8_layers_travel_as_bytes(title: str, found: Cases) -> None:
    for plain, gathered in both(found, title):
        none, before = plain["bytes"]
        in_fp8, in_bf16 = gathered["bytes"]
        assert none == 0
        assert in_bf16 < before
        assert in_fp8 > in_bf16 / 4
        # Up to the padding of other buckets, which for one layer's matrices is much.
        if "first and last" not in title:
            assert in_fp8 == pytest.approx((before - in_bf16) / 2, rel=0.2)
        weights, rounded = plain["weights"], gathered["weights"]
        moved = {name for name in weights if not torch.equal(weights[name], rounded[name])}
        linear = {name for name, weight in weights.items() if "linear_" in name and weight.ndim == 2}
        kept = {name for name in linear if "first and last" in title and ("layers.0." in name or "layers.3." in name)}
        assert moved == linear - kept
        for name in moved:
            # What three bits of mantissa leave.
            distance = (rounded[name] - weights[name]).float().norm() / weights[name].float().norm()
            assert 0.01 < distance < 0.04


def test_replicas_hold_the_same_weights(found: Cases) -> None:
    """The owner takes the rounded weights as well. Ranks 0 and 1, and 2 and 3, are a pipeline stage's replicas."""
    ranks = found["PP2", True]
    for first, second in (ranks[:2], ranks[2:]):
        ours, theirs = first["weights"], second["weights"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.matrix
def test_checkpoints_hold_weights_as_they_are_and_training_continues(corpus: str, tmp_path: Path) -> None:
    losses = {}
    for name, fields in WHOLE_RUNS.items():
        places = {key: str(tmp_path / fields[key]) for key in ("save", "load") if key in fields}
        rows = rows_of_run(RANKS, corpus, tmp_path / name, **{**fields, **places})
        losses[name] = [row["loss"] for row in rows]
    without, gathered = (CheckpointReader(tmp_path / name / "iter_0000002") for name in ("saved-without", "saved"))
    slabs = list(without.slabs())
    assert list(gathered.slabs()) == slabs
    for slab in slabs:
        assert torch.equal(gathered.read(slab), without.read(slab)), slab
    assert len(losses["whole"]) == 4
    assert [*losses["first"], *losses["second"]] == losses["whole"]
