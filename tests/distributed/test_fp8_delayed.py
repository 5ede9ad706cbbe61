"""Delayed scaling in training: the same for every layout, whatever recomputes, evaluates, saves and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, rows_of_run, toy_config, trained

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
# Losses, and the state of the scales.
Found = tuple[list[float], dict[str, torch.Tensor] | None]


def train(prefix: str, folder: str, fields: dict[str, Any]) -> Found:
    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(2)
    trainer, rows = trained(toy_config(prefix, Path(folder), train_iters=ITERATIONS, quiet=True, **fields))
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses, trainer.scales.state() if trainer.scales is not None else None


@pytest.fixture(scope="module")
def alone(cases: Callable[..., Cases], corpus: str) -> Cases:
    return cases(lambda title, folder: run_distributed(train, 1, corpus, str(folder), ALONE[title])[0])


def first_step(found: Found) -> torch.Tensor:
    """What the history holds of the first step."""
    state = found[1]
    assert state is not None
    return state["history"][ITERATIONS]


@pytest.mark.parametrize("title", kept([title for title in ALONE if "none" not in title], {"history", "experts"}))
def test_training_is_close_to_training_without(title: str, alone: Cases) -> None:
    plain, _ = alone["experts, none" if "experts" in title else "none"]
    losses, _ = alone[title]
    assert losses[-1] == pytest.approx(plain[-1], rel=0.02)
    assert losses != plain


@pytest.mark.parametrize("title", kept(["recomputed", "evaluated"], {"evaluated"}))
def test_neither_recomputation_nor_evaluation_counts(title: str, alone: Cases) -> None:
    (losses, state), (expected, scales) = alone[title], alone["history"]
    assert losses == expected
    assert state is not None
    assert scales is not None
    assert torch.equal(state["history"], scales["history"])
    assert torch.equal(state["scales"], scales["scales"])


@pytest.mark.parametrize("title", ["history", "experts"])
def test_every_tensor_is_seen(title: str, alone: Cases) -> None:
    assert bool((first_step(alone[title]) > 0).all())


@pytest.mark.matrix
def test_looking_ahead_counts_once(alone: Cases) -> None:
    """The loads of the first step differ, and with them gradients; what went forward does not."""
    exact, plain = (first_step(alone[title]) for title in ("experts, loads known before", "experts"))
    assert torch.equal(exact[:2], plain[:2])


@pytest.mark.matrix
def test_micro_batches_do_not_matter(alone: Cases) -> None:
    assert alone["one micro-batch"][0] == pytest.approx(alone["history"][0], rel=1e-2)
    torch.testing.assert_close(first_step(alone["one micro-batch"]), first_step(alone["history"]), rtol=0.1, atol=0)


@pytest.mark.parametrize("title", kept(TOGETHER, {"history tp", "experts ep"}))
def test_layouts_agree(title: str, alone: Cases, corpus: str, tmp_path: Path) -> None:
    expected = alone[title.split()[0]]
    for found in run_distributed(train, 2, corpus, str(tmp_path), TOGETHER[title]):
        # Sums that differ by 1e-7 round to FP8 differently, by 6%: rare, and visible.
        assert found[0][0] == pytest.approx(expected[0][0], rel=1e-4)
        assert found[0] == pytest.approx(expected[0], rel=1e-2)
        torch.testing.assert_close(first_step(found), first_step(expected), rtol=0.1, atol=0)


@pytest.fixture(scope="module")
def saved(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Checkpoints after 3 of the iterations, with scales or "without"."""

    def save(name: str, folder: Path) -> str:
        store = str(folder / "store")
        fields = {**(HISTORY if name == "with" else {}), "save": store, "exit_interval": 3}
        rows_of_run(1, corpus, folder, train_iters=ITERATIONS, quiet=True, **fields)
        return store

    return cases(save, "saved")


@pytest.mark.parametrize(
    ("title", "ranks", "store"),
    kept([("one", 1, "with"), ("first scales", 1, "without"), *((name, 2, "with") for name in LAYOUTS)], {"one", "tp"}),
)
def test_a_resumed_run_continues(
    title: str, ranks: int, store: str, saved: Cases, alone: Cases, corpus: str, tmp_path: Path
) -> None:
    """Bit for bit in the same layout, with the same scales in any other; and also where there were none before."""
    fields = {**HISTORY, **LAYOUTS.get(title, {}), "load": saved[store]}
    rows = rows_of_run(ranks, corpus, tmp_path, train_iters=ITERATIONS, quiet=True, **fields)
    whole, losses = alone["history"][0], [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == ITERATIONS - 3
    if title == "one":
        assert losses == whole[3:]
    if store == "with":
        # With scales of 1, as at the start, it would be off by 3e-4.
        assert losses[0] == pytest.approx(whole[3], rel=1e-4)
