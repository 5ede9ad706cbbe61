"""Delayed scaling in training: the same for every layout, whatever recomputes, evaluates, saves and goes on."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.training.logging import read_metrics
from tests.run_distributed import free_port, run_distributed
from tests.toy import EXPERTS, toy_config, trained, write_corpus

ITERATIONS = 8
DELAYED = {"fp8_format": "hybrid", "fp8_emulation": True, "fp8_recipe": "delayed"}
# Long enough for the first step to stay.
HISTORY = {**DELAYED, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
ALONE: dict[str, dict[str, Any]] = {
    "none": {},
    "delayed": DELAYED,
    "history": HISTORY,
    "recomputed": {**HISTORY, "recompute_granularity": "full"},
    "evaluated": {**HISTORY, "eval_interval": 2, "eval_iters": 1},
    "one micro-batch": {**HISTORY, "micro_batch_size": 32},
    "experts, none": EXPERTS,
    "experts": {**EXPERTS, **HISTORY},
    "experts, loads known before": {**EXPERTS, **HISTORY, "moe_balance_statistics": "exact"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {"expert_model_parallel_size": 2},
    "expert tp": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "sequence_parallel": True},
}
TOGETHER = {
    **{f"history {name}": {**HISTORY, **layout} for name, layout in LAYOUTS.items()},
    **{f"experts {name}": {**EXPERTS, **HISTORY, **layout} for name, layout in EXPERT_LAYOUTS.items()},
}
Found = dict[str, tuple[list[float], dict[str, torch.Tensor] | None]]


def train_all(prefix: str, folder: str, cases: dict[str, dict[str, Any]]) -> Found:
    """Train each case; return its losses and the state of its scales."""
    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(2)
    result: Found = {}
    for title, overrides in cases.items():
        config = toy_config(prefix, Path(folder), train_iters=ITERATIONS, quiet=True, **overrides)
        trainer, rows = trained(config)
        losses = [row["loss"] for row in rows if "loss" in row]
        result[title] = losses, trainer.scales.state() if trainer.scales is not None else None
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    [result] = run_distributed(train_all, 1, corpus, str(tmp_path_factory.mktemp("alone")), ALONE)
    return result


def first_step(found: Found, title: str) -> torch.Tensor:
    """What the history holds of the first step."""
    state = found[title][1]
    assert state is not None
    return state["history"][ITERATIONS]


@pytest.mark.parametrize("title", [title for title in ALONE if "none" not in title])
def test_training_is_close_to_training_without(title: str, alone: Found) -> None:
    plain, _ = alone["experts, none" if "experts" in title else "none"]
    losses, _ = alone[title]
    assert losses[-1] == pytest.approx(plain[-1], rel=0.02)
    assert losses != plain


@pytest.mark.parametrize("title", ["recomputed", "evaluated"])
def test_neither_recomputation_nor_evaluation_counts(title: str, alone: Found) -> None:
    (losses, state), (expected, scales) = alone[title], alone["history"]
    assert losses == expected
    assert state is not None
    assert scales is not None
    assert torch.equal(state["history"], scales["history"])
    assert torch.equal(state["scales"], scales["scales"])


@pytest.mark.parametrize("title", ["history", "experts"])
def test_every_tensor_is_seen(title: str, alone: Found) -> None:
    assert bool((first_step(alone, title) > 0).all())


def test_looking_ahead_counts_once(alone: Found) -> None:
    """The loads of the first step differ, and with them gradients; what went forward does not."""
    exact, plain = (first_step(alone, title) for title in ("experts, loads known before", "experts"))
    assert torch.equal(exact[:2], plain[:2])


def test_micro_batches_do_not_matter(alone: Found) -> None:
    assert alone["one micro-batch"][0] == pytest.approx(alone["history"][0], rel=1e-2)
    torch.testing.assert_close(first_step(alone, "one micro-batch"), first_step(alone, "history"), rtol=0.1, atol=0)


def test_layouts_agree(alone: Found, corpus: str, tmp_path: Path) -> None:
    for rank in run_distributed(train_all, 2, corpus, str(tmp_path), TOGETHER):
        for title, (losses, _) in rank.items():
            one = title.split()[0]
            # Sums that differ by 1e-7 round to FP8 differently, by 6%: rare, and visible.
            assert losses[0] == pytest.approx(alone[one][0][0], rel=1e-4), title
            assert losses == pytest.approx(alone[one][0], rel=1e-2), title
            torch.testing.assert_close(first_step(rank, title), first_step(alone, one), rtol=0.1, atol=0)


def pretrain_all(prefix: str, folder: str, runs: dict[str, dict[str, Any]], ports: dict[str, int]) -> None:
    from megatron_hyperp.training.pretrain import pretrain

    for name, overrides in runs.items():
        os.environ["MASTER_PORT"] = str(ports[name])
        config = toy_config(prefix, Path(folder) / name, train_iters=ITERATIONS, quiet=True, **overrides)
        pretrain(config, world_size=int(os.environ["WORLD_SIZE"]))
        gc.collect()  # process groups live on in the cycles of a dropped model, with their threads and sockets


def test_a_resumed_run_goes_on(alone: Found, corpus: str, tmp_path: Path) -> None:
    """Bit for bit in the same layout, with the same scales in any other; and also where there were none before."""
    store, plain = str(tmp_path / "store"), str(tmp_path / "plain store")
    saved = {**HISTORY, "save": store, "exit_interval": 3}
    resumed = {**HISTORY, "load": store}
    on_one = {
        "saved": saved,
        "resumed": resumed,
        "without": {"save": plain, "exit_interval": 3},
        "with": {**HISTORY, "load": plain},
    }
    run_distributed(pretrain_all, 1, corpus, str(tmp_path), on_one, {name: free_port() for name in on_one})
    on_two = {name: {**resumed, **layout} for name, layout in LAYOUTS.items()}
    run_distributed(pretrain_all, 2, corpus, str(tmp_path), on_two, {name: free_port() for name in on_two})
    whole = alone["history"][0]
    for name in ("resumed", "with", *on_two):
        losses = [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        assert len(losses) == ITERATIONS - 3
        if name == "resumed":
            assert losses == whole[3:]
        if name != "with":
            # With scales of 1, as at the start, it would be off by 3e-4.
            assert losses[0] == pytest.approx(whole[3], rel=1e-4), name
