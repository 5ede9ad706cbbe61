"""What a run does with numbers that are not finite: it saves the weights before them, names the tensor, continues."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import divergence
from megatron_hyperp.training.checkpoint_folders import complete_checkpoints
from megatron_hyperp.training.logging import read_events
from megatron_hyperp.training.loop import Trainer
from megatron_hyperp.training.preflight import check
from tests.toy import one_rank, toy_config, write_corpus

SKIPS = divergence.SKIPS_IN_A_ROW
Plant = Callable[[Trainer], None]


def family_of(trainer: Trainer, rule: str) -> Any:
    """The first family of a rule."""
    return next(family for family in trainer.optimizer.families if family.rule.name == rule)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    device.adapt_megatron()
    with one_rank():
        yield write_corpus(tmp_path_factory.mktemp("corpus"))


def train(prefix: str, folder: Path, *, plant: Plant | None = None, at: range = range(0), **fields: Any) -> Trainer:
    """Train ``SKIPS`` + 6 iterations, from the newest checkpoint on.

    Between the backward pass and the step, ``plant`` is called in the iterations ``at``.
    """
    from megatron.core import parallel_state

    root = folder / "checkpoints"
    shape = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "global_batch_size": 8}
    places = {"save": str(root), "load": str(root)}
    config = toy_config(prefix, folder, **{**shape, "train_iters": SKIPS + 6, **places, **fields})
    config, tokenizer, resume_from, _ = check(config, 1)
    try:
        trainer = Trainer(config, tokenizer, resume_from)
        original = trainer._train_batch

        def train_batch(batches: Any) -> Any:
            losses = original(batches)
            if plant is not None and trainer.progress.iteration + 1 in at:
                plant(trainer)
            return losses

        trainer._train_batch = train_batch  # type: ignore[method-assign]
        try:
            trainer.train()
        finally:
            trainer.close_reports()
    finally:
        parallel_state.destroy_model_parallel()
    return trainer


def bad_gradient(trainer: Trainer) -> None:
    family_of(trainer, "muonh").runs[0].gradients.view(-1)[0] = math.nan


def bad_momentum(trainer: Trainer) -> None:
    family_of(trainer, "muonh").state["momentum_buffer"].view(-1)[0] = math.inf


def bad_master(trainer: Trainer) -> None:
    family_of(trainer, "adamh").master.view(-1)[0] = math.nan


def bad_weight(trainer: Trainer) -> None:
    weight = family_of(trainer, "muonh").routes[0].parameter
    weight.data.view(-1)[0] = math.nan
    bad_gradient(trainer)


def names(folder: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(folder / "checkpoints")]


def test_a_run_that_gives_up_saves_the_weights_before_and_goes_on_behind(prefix: str, tmp_path: Path) -> None:
    """Without ``--save-interval``; the same command passes the place by."""
    at = range(4, 4 + SKIPS)
    words = rf"{SKIPS} steps in a row had a non-finite gradient or update, up to iteration {at[-1]} .*the gradient of "
    with pytest.raises(
        UsageError, match=words + r"decoder\S+ on rank 0 .* are saved in \S+iter_0000023: the same command continues"
    ):
        train(prefix, tmp_path, plant=bad_gradient, at=at)
    assert names(tmp_path) == ["iter_0000023"]
    events = [event for event in read_events(tmp_path) if event["kind"] == "skipped"]
    assert [event["iteration"] for event in events] == list(at)
    assert "the gradient of decoder" in events[0]["message"]
    trainer = train(prefix, tmp_path, plant=bad_gradient, at=at)
    assert trainer.progress.iteration == SKIPS + 6
    assert (trainer.optimizer.steps_taken, trainer.optimizer.steps_skipped) == (6, SKIPS)


def test_nothing_is_saved_where_nothing_has_moved(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resume from an earlier checkpoint, with a lower --lr or other data"):
        train(prefix, tmp_path, plant=bad_gradient, at=range(1, SKIPS + 1))
    assert names(tmp_path) == []


def test_older_checkpoints_stay(prefix: str, tmp_path: Path) -> None:
    """What is saved on giving up may not be sound in all respects: it takes no checkpoint's place."""
    with pytest.raises(UsageError, match=r"go back further: --load \S+iter_0000004 and another --save"):
        train(prefix, tmp_path, plant=bad_gradient, at=range(6, 6 + SKIPS), save_interval=2, keep=1)
    assert names(tmp_path)[0] == "iter_0000004"


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (bad_momentum, r"the optimizer's momentum_buffer of decoder\S+ on rank 0 is not finite"),
        (bad_master, r"the fp32 weight of output_layer.weight on rank 0 is not finite"),
        (bad_weight, r"the weight decoder\S+ on rank 0 is not finite"),
    ],
)
def test_damaged_weights_end_the_run_at_once(prefix: str, tmp_path: Path, plant: Plant, named: str) -> None:
    """By name; where the optimizer's weights are sound they are saved, unless there is a checkpoint to go back to."""
    for folder, fields in ((tmp_path / "alone", {}), (tmp_path / "saved", {"save_interval": 2})):
        folder.mkdir()
        with pytest.raises(UsageError, match=f"{named}.*, found in iteration 4; ") as raised:
            train(prefix, folder, plant=plant, at=range(4, 5), train_iters=6, **fields)
        if fields:
            assert names(folder) == ["iter_0000002"]
            assert re.search(r"start again from \S+iter_0000002, and without that node", str(raised.value))
        elif plant is bad_weight:
            assert names(folder) == ["iter_0000003"]
            assert "saved in" in str(raised.value)
        else:
            assert names(folder) == []
            assert "start again, with --save and --save-interval" in str(raised.value)
        assert any(event["kind"] == "corrupt" for event in read_events(folder))
        assert train(prefix, folder, train_iters=6).progress.iteration == 6


def test_what_is_loaded_is_finite(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hyperp.training import saving

    # A checkpoint of another tool's: this one saves no such numbers.
    monkeypatch.setattr(saving, "_check_finite", lambda state, iteration: None)

    def bad_gain(trainer: Trainer) -> None:
        family_of(trainer, "adamw").master.view(-1)[0] = math.inf

    train(prefix, tmp_path, plant=bad_gain, at=range(2, 3), train_iters=2)
    with pytest.raises(
        UsageError, match=r"iter_0000002: the fp32 weight of \S+ on rank 0 is not finite; name an older"
    ):
        train(prefix, tmp_path, train_iters=4)


def test_an_expert_that_dies_stays_finite(prefix: str, tmp_path: Path) -> None:
    """The momentum that an expert has a thousand steps after its last token, and no gradient."""

    def die(trainer: Trainer) -> None:
        for family in trainer.optimizer.families:
            for index, entry in enumerate(family.routes):
                if ".local_experts.1." in entry.name:
                    family.state["momentum_buffer"][index] = 1e-23 * torch.randn(family.master.shape[1:])
                    entry.block.of(entry.parameter.main_grad).zero_()  # type: ignore[attr-defined]

    experts = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    trainer = train(prefix, tmp_path, plant=die, at=range(2, 5), train_iters=5, **experts)
    assert trainer.optimizer.steps_skipped == 0
    assert all(bool(family.master.isfinite().all()) for family in trainer.optimizer.families)
    assert trainer.optimizer.radius_drift() < 1e-5
