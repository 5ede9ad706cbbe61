"""Runs that resume: how long they are, and where in the schedule, whatever their batch size."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.data.batches import Batch, filled_up
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import checkpointing, preflight, schedule
from megatron_hyperp.training.compatibility import changed_settings
from megatron_hyperp.training.logging import CONFIG_FILE, METRICS_FILE, read_metrics
from megatron_hyperp.training.schedule import Schedule, check_end, remaining, resumed

SIZES = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16"
# 96 sequences, 16 of them warm-up.
RUN = f"{SIZES} --train-iters 12 --global-batch-size 8 --lr-warmup-iters 2"


def parse(flags: str) -> Config:
    return arguments.parse(flags.split(), description="")


def resume(flags: str, *launches: str, old: bool = False) -> tuple[Config, Schedule]:
    """Start a run and resume it, each time from the checkpoint of the launch before.

    Args:
        flags: of the first launch.
        launches: flags of the others.
        old: whether checkpoints have no schedule, as those of earlier versions.
    """
    config = parse(flags).resolve()
    course = Schedule.of(config)
    for words in launches:
        kept = Schedule.from_state(None if old else course.state(), config)
        config, course = resumed(parse(words), config, kept, Config.resolve)
    return config, course


def spans(course: Schedule) -> tuple[int, int, int]:
    return course.total.samples, course.warmup.samples, course.wsd_decay.samples


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("style", ["linear", "WSD", "WSD --lr-wsd-decay-iters 3"])
def test_the_same_batch_changes_nothing(style: str, old: bool) -> None:
    flags = f"{RUN} --lr-decay-style {style}"
    config, course = resume(flags, flags, flags, old=old)
    assert config == parse(flags).resolve()
    assert spans(course) == spans(Schedule.of(config))
    # Steps of the schedule are iterations, so that rates are those of earlier versions to the bit.
    assert course.unit(8) == 8


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("batch", "iterations"), [(16, 6), (4, 24), (6, 16), (10, 10), (96, 1), (100, 1)])
def test_another_batch_changes_neither_tokens_nor_schedule(batch: int, iterations: int, old: bool) -> None:
    flags = f"{RUN} --lr-decay-style WSD --lr-wsd-decay-iters 3"
    other = flags.replace("--global-batch-size 8", f"--global-batch-size {batch}")
    config, course = resume(flags, other, old=old)
    assert spans(course) == (96, 16, 24)
    assert config.training.train_tokens == 96 * 16
    assert (config.training.global_batch_size, config.training.train_iters) == (batch, iterations)
    # The law's rate is that of the batch, and of the same tokens.
    before = parse(flags).resolve().learning_rate().value
    assert config.learning_rate().value == pytest.approx(before * math.sqrt(batch / 8))
    assert config.optimizer.min_lr == pytest.approx(0.1 * config.learning_rate().value)
    # The same command resumes it, and so does its own config, with any batch.
    again, same = resume(flags, other, other)
    assert (again, spans(same)) == (config, spans(course))
    back = resume(flags, other, flags)
    assert back[0] == parse(flags).resolve()
    assert spans(back[1]) == (96, 16, 24)


def test_a_runs_own_config_takes_another_batch() -> None:
    """It has both train_iters and train_tokens, which contradict each other with another batch."""
    for first in (8, 16):
        given = parse(RUN)
        given.training.global_batch_size = first
        config = given.resolve()
        course = Schedule.of(config)
        for batch in (16, 6, 4, 8):
            own = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=batch))
            config, course = resumed(own, config, course, Config.resolve)
            assert spans(course)[:2] == (12 * first, 2 * first)
            assert config.training.global_batch_size == batch


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # Counted in batches of the new size.
        ("--train-iters 24 --global-batch-size 8 --lr-warmup-iters 2", (192, 16, 32)),
        ("--train-iters 24 --global-batch-size 16 --lr-warmup-iters 2", (384, 16, 64)),
        ("--train-iters 12 --global-batch-size 16 --lr-warmup-iters 3", (96, 48, 16)),
        ("--train-iters 12 --global-batch-size 16 --lr-warmup-iters 2 --lr-wsd-decay-iters 1", (96, 16, 16)),
        # The same tokens by another name.
        ("--train-iters 6 --global-batch-size 16 --lr-warmup-iters 2", (96, 16, 16)),
        ("--train-tokens 1536 --global-batch-size 16 --lr-warmup-iters 2", (96, 16, 16)),
        ("--train-tokens 1552 --global-batch-size 16 --lr-warmup-iters 2", (112, 16, 16)),
    ],
)
def test_a_changed_setting_is_followed(flags: str, expected: tuple[int, int, int]) -> None:
    _, course = resume(RUN, f"{SIZES} {flags}")
    assert spans(course) == expected
    _, again = resume(RUN, f"{SIZES} {flags}", f"{SIZES} {flags}")
    assert spans(again) == expected


def test_a_budget_from_the_depth_does_not_depend_on_the_batch() -> None:
    flags = "--depth 2 --aspect-ratio 32 --vocab-size 64 --seq-length 64 --base-tokens 1e6 --global-batch-size"
    config, course = resume(f"{flags} 8", f"{flags} 7")
    assert spans(course)[0] == spans(Schedule.of(parse(f"{flags} 8").resolve()))[0]
    longer, course = resume(f"{flags} 8", f"{flags} 8 --base-tokens 2e6")
    assert longer.training.train_tokens == pytest.approx(2 * config.training.train_tokens, abs=1)
    assert spans(course) == spans(Schedule.of(longer))


def test_lengths_that_contradict_each_other_are_still_refused() -> None:
    with pytest.raises(UsageError, match="--train-iters 13 and --train-tokens 1536 contradict each other"):
        resume(RUN, f"{RUN} --train-tokens 1536".replace("--train-iters 12", "--train-iters 13"))
    with pytest.raises(UsageError, match="--lr-warmup-iters 2 leaves none of the 1 iterations"):
        resume(RUN, RUN.replace("--train-iters 12", "--train-iters 1"))


def test_other_lengths_of_sequences_are_the_same_tokens() -> None:
    config, course = resume(RUN, RUN.replace("--seq-length 16", "--seq-length 32"))
    assert spans(course) == (48, 8, 8)
    assert config.training.train_tokens == 96 * 16


def test_the_checkpoints_schedule_is_kept_by_flag() -> None:
    flags = f"{RUN} --lr-decay-style WSD --weight-decay 0.1"
    kept = f"{SIZES} --train-iters 12 --global-batch-size 16 --lr 3 --use-checkpoint-opt-param-scheduler"
    before = parse(flags).resolve()
    for launches in ([kept], [kept, kept]):
        config, course = resume(flags, *launches)
        assert config.learning_rate().value == before.learning_rate().value
        for name in ("min_lr", "lr_decay_style", "weight_decay"):
            assert getattr(config.optimizer, name) == getattr(before.optimizer, name)
        assert spans(course) == spans(Schedule.of(before))
    # Without the flag the settings count again.
    config, course = resume(flags, kept, kept.replace("--use-checkpoint-opt-param-scheduler", ""))
    assert (config.learning_rate().value, spans(course)) == (3, (96, 0, 16))
    with pytest.raises(UsageError, match="keeps the checkpoint's 1,536 tokens, but --train-iters or --train-tokens"):
        resume(flags, kept.replace("--train-iters 12", "--train-iters 13"))


class Optimizer:
    """Has one group of parameters, as far as a scheduler goes."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, float]] = [{}]


def rates(course: Schedule, config: Config, samples: range) -> list[float]:
    """Learning rates as the trainer computes them, after so many sequences."""
    unit = course.unit(config.training.global_batch_size)
    peak, minimum = config.learning_rate().value, config.optimizer.min_lr
    assert minimum is not None
    scheduler = OptimizerParamScheduler(
        Optimizer(),
        init_lr=0.0,
        max_lr=peak,
        min_lr=minimum,
        lr_warmup_steps=course.warmup.samples // unit,
        lr_decay_steps=course.total.samples // unit,
        lr_decay_style=config.optimizer.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=course.wsd_decay.samples // unit,
        lr_wsd_decay_style="linear",
    )
    found = []
    for consumed in samples:
        scheduler.num_steps = consumed / unit
        scheduler.step(0)
        found.append(scheduler.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD", "constant"])
def test_the_rate_after_the_same_sequences_differs_by_the_laws_factor_alone(style: str) -> None:
    flags = f"{RUN} --lr-decay-style {style}"
    first, course = resume(flags)
    expected = rates(course, first, range(0, 97, 8))
    assert expected[-1] == (first.learning_rate().value if style == "constant" else first.optimizer.min_lr)
    for batch in (16, 6):
        other, course = resume(flags, flags.replace("--global-batch-size 8", f"--global-batch-size {batch}"))
        factor = math.sqrt(batch / 8)
        assert rates(course, other, range(0, 97, 8)) == pytest.approx([factor * rate for rate in expected])
        # Beyond the end, where the last batch may reach.
        assert rates(course, other, range(97, 100))[-1] == pytest.approx(factor * expected[-1])


def test_what_is_left_is_told() -> None:
    course = Schedule.of(parse(RUN).resolve())
    assert remaining(course, 48, 6, 8) == "48 of 96 sequences done; 6 iterations of 8 to go, up to iteration 12"
    assert remaining(course, 48, 6, 10) == (
        "48 of 96 sequences done; 5 iterations of 10 to go, up to iteration 11, the last of which exceeds the end by 2"
    )
    assert remaining(course, 98, 11, 10) == "98 of 96 sequences done"


def test_an_end_before_the_checkpoint_is_refused() -> None:
    saved = parse(RUN).resolve()
    shorter, course = resume(RUN, RUN.replace("--train-iters 12", "--train-iters 5"))
    check_end("there", shorter, saved, course, 40)
    with pytest.raises(UsageError, match=r"end after 40 sequences \(5 iterations of 8\), but .* there .* 48; raise"):
        check_end("there", shorter, saved, course, 48)
    # One that is done is done, though its last batch has exceeded the end.
    check_end("there", saved, saved, Schedule.of(saved), 98)


@pytest.mark.parametrize(
    "state", [{}, [], {"total": 3}, {"total": {"samples": 1}}, {"samples": {"samples": 1, "settings": []}}]
)
def test_a_schedule_that_is_none_is_refused(state: Any) -> None:
    config = parse(RUN).resolve()
    with pytest.raises(UsageError, match="schedule cannot be read"):
        Schedule.from_state(state, config)
    whole = Schedule.of(config).state()
    whole["warmup"]["samples"] = 96
    with pytest.raises(UsageError, match="schedule cannot be read"):
        Schedule.from_state(whole, config)


def test_a_checkpoint_without_progress_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "common_state", lambda _: {"progress": {"epochs": 3}})
    with pytest.raises(UsageError, match="there does not say how far it was trained"):
        preflight._consumed(parse(RUN), Path("there"))


def test_what_a_changed_batch_changes_is_told(tmp_path: Path) -> None:
    for words, lines in (
        ("", ["was 0.*; for 256 tokens per batch instead of 128 the transfer law has a factor of 1.414, which"]),
        (" --lr 0.1", [r"the peak learning rate stays 0\.1 with the other batch"]),
        (" --optimizer muonh", ["the peak learning rate stays 0.* with the other batch"]),
        (" --optimizer muonh --lr-preset marin-2608", ["the transfer law has a factor of 1.414, which"]),
        (
            " --lr-exponents embedding:batch=1 --base-batch-tokens 128",
            ["learning rate of the embedding was 1 times the peak in the checkpoint and is now 2 times"],
        ),
    ):
        before = parse(RUN + words).resolve()
        (tmp_path / CONFIG_FILE).write_text(arguments.to_yaml(before))
        now, _ = resume(RUN + words, f"{RUN}{words}".replace("--global-batch-size 8", "--global-batch-size 16"))
        told = "\n".join(changed_settings(tmp_path, now))
        for line in (*lines, "global_batch_size was 8", "an evaluation took 80 sequences .* and now takes 160"):
            assert len(re.findall(line, told)) == 1
        assert "_iters was" not in told
        assert "the order of the data" not in told


class Numbers(Dataset[Batch]):
    """Three samples."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return index


def test_the_last_batch_is_filled_up() -> None:
    numbers = Numbers()
    assert filled_up(numbers, planned=3, length=3) is numbers
    longer = filled_up(numbers, planned=3, length=8)
    assert [longer[index] for index in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(UsageError, match="holds 3 samples, fewer than the 4 of the run"):
        filled_up(numbers, planned=4, length=4)


def test_rows_after_a_point_that_a_run_went_back_to_do_not_count(tmp_path: Path) -> None:
    """With a larger batch its iterations may end before theirs."""
    iterations = [1, 2, 3, 4, 5, 6, 3, 4]
    lines = [f'{{"iteration": {at}, "tokens": {index}, "loss": 1.0}}' for index, at in enumerate(iterations)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines))
    assert [(row["iteration"], row["tokens"]) for row in read_metrics(tmp_path)] == [(1, 0), (2, 1), (3, 6), (4, 7)]


def test_samples_are_counted_in_whole_sequences() -> None:
    assert [schedule.samples_of(tokens, 16) for tokens in (0, 16, 17, 32)] == [0, 1, 2, 2]
