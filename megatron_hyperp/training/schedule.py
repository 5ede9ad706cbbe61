"""How long a run is and how its learning rate moves, in sequences, so that another batch size changes neither.

``--train-iters``, ``--lr-warmup-iters`` and ``--lr-wsd-decay-iters`` are iterations of the global batch that they are
given with. A checkpoint keeps the sequences that they stand for. A run that resumes with another batch size and the
same settings ends after the same sequences, at the same point of the schedule; a setting that has changed counts
batches of the new size.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_hyperp.config import Config, TrainingConfig
from megatron_hyperp.errors import UsageError
from megatron_hyperp.resolve import default_wsd_decay

# Key of :meth:`Schedule.state` in the state that all ranks share.
SCHEDULE = "schedule"
# What --use-checkpoint-opt-param-scheduler takes from the checkpoint, besides the peak learning rate and all lengths.
KEPT_BY_FLAG = ("min_lr", "lr_decay_style", "weight_decay")

Resolve = Callable[[Config], Config]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a run.

    Attributes:
        samples: its length in sequences.
        settings: the values of the setting in iterations that have stood for it; None is the derived value.
    """

    samples: int
    settings: tuple[int | None, ...]

    def with_settings(self, *values: int | None) -> Span:
        """Return the same part, for which these values stand as well."""
        return Span(self.samples, tuple(dict.fromkeys((*self.settings, *values))))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The parts of a run.

    Attributes:
        total: the whole run; the learning rate has decayed at its end.
        warmup: linear warm-up.
        wsd_decay: the last part, in which WSD decays.
    """

    total: Span
    warmup: Span
    wsd_decay: Span

    @classmethod
    def of(cls, config: Config) -> Schedule:
        """Return the schedule of a run that has one batch size throughout.

        Args:
            config: resolved.
        """
        batch, iterations = config.training.global_batch_size, config.training.train_iters
        warmup, decay = config.optimizer.lr_warmup_iters, config.optimizer.lr_wsd_decay_iters
        assert decay is not None
        derived = (None,) if decay == default_wsd_decay(iterations, warmup) else ()
        return cls(
            Span(iterations * batch, (iterations,)),
            Span(warmup * batch, (warmup,)),
            Span(decay * batch, (decay, *derived)),
        )

    @classmethod
    def from_state(cls, state: Any, config: Config) -> Schedule:
        """Return the schedule that a checkpoint has.

        Args:
            state: what :meth:`state` returned; None from versions that did not save it.
            config: of the checkpoint, from which it then follows.

        Raises:
            UsageError: the state is not a schedule.
        """
        if state is None:
            return cls.of(config)
        try:
            spans = {name: Span(int(span["samples"]), tuple(span["settings"])) for name, span in state.items()}
            schedule = cls(**spans)
            if not (0 <= schedule.warmup.samples < schedule.total.samples and schedule.wsd_decay.samples >= 0):
                raise ValueError("parts that do not fit into the run")
            return schedule
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                "the checkpoint's schedule cannot be read; load an older checkpoint", same_on_all_ranks=True
            ) from error

    def state(self) -> dict[str, dict[str, Any]]:
        """Return plain values for a checkpoint."""
        spans = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: {"samples": span.samples, "settings": list(span.settings)} for name, span in spans.items()}

    def for_seq_length(self, before: int, now: int) -> Schedule:
        """Return the schedule of the same tokens in sequences of ``now`` instead of ``before`` tokens, rounded up."""
        spans = [getattr(self, item.name) for item in dataclasses.fields(self)]
        return Schedule(*(Span(-(-span.samples * before // now), span.settings) for span in spans))

    def unit(self, batch: int) -> int:
        """Return the sequences per step of the schedule: a batch, so that steps are iterations, unless it has changed.

        Args:
            batch: sequences per iteration.
        """
        return math.gcd(self.total.samples, self.warmup.samples, self.wsd_decay.samples, batch)

    def iterations_left(self, consumed_samples: int, batch: int) -> int:
        """Return the iterations from ``consumed_samples`` to the end; the last one may exceed it by part of a batch."""
        return max(0, -(-(self.total.samples - consumed_samples) // batch))


def samples_of(consumed_tokens: int, seq_length: int) -> int:
    """Return where a run stands in the dataset, in sequences, rounded up if their length has changed."""
    return -(-consumed_tokens // seq_length)


def resumed(given: Config, saved: Config, schedule: Schedule, resolve: Resolve) -> tuple[Config, Schedule]:
    """Return the resolved config and the schedule of a run that resumes from a checkpoint.

    The config is that of a run with the batch size of now throughout: its iterations are the schedule's sequences in
    batches of this size, rounded up for the whole run and down for its parts.

    Args:
        given: as the user gave it, not resolved.
        saved: of the checkpoint, resolved.
        schedule: of the checkpoint.
        resolve: completes and checks a config.

    Raises:
        UsageError: as ``resolve``; or flags ask for another length than that of the checkpoint, which is to be kept.
    """
    config, schedule = copy.deepcopy(given), schedule.for_seq_length(saved.model.seq_length, given.model.seq_length)
    options, by_flag = config.optimizer, given.optimizer.use_checkpoint_opt_param_scheduler
    keeps_total = _keeps_length(given, saved, schedule, resolve)
    if by_flag:
        _take_learning_rate(config, saved, keeps_total=keeps_total)
    if keeps_total:
        config.training.train_iters = TrainingConfig().train_iters
        config.training.train_tokens = saved.training.train_tokens
    whole = _without_parts(config, resolve).training
    batch = whole.global_batch_size
    keeps_warmup = by_flag or options.lr_warmup_iters in schedule.warmup.settings
    if keeps_warmup:
        options.lr_warmup_iters = schedule.warmup.samples // batch
    # Another length has another derived decay.
    known = set(schedule.wsd_decay.settings) - (set() if keeps_total else {None})
    keeps_decay = by_flag or options.lr_wsd_decay_iters in known
    if keeps_decay:
        options.lr_wsd_decay_iters = max(1, schedule.wsd_decay.samples // batch)

    config = resolve(config)
    now = Schedule.of(config)
    total = schedule.total if keeps_total else now.total
    warmup = schedule.warmup if keeps_warmup else now.warmup
    decay = schedule.wsd_decay if keeps_decay else now.wsd_decay
    decay = Span(min(decay.samples, total.samples - warmup.samples), decay.settings)
    # The next launch may have the settings of this command line, or of this run's config.yaml.
    asked = config if by_flag else given
    return config, Schedule(
        total.with_settings(
            whole.train_iters if given.training.train_iters is None else given.training.train_iters, whole.train_iters
        ),
        warmup.with_settings(asked.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_iters),
        decay.with_settings(asked.optimizer.lr_wsd_decay_iters, config.optimizer.lr_wsd_decay_iters),
    )


def _take_learning_rate(config: Config, saved: Config, *, keeps_total: bool) -> None:
    """Set what --use-checkpoint-opt-param-scheduler takes from the checkpoint, but for lengths."""
    if not keeps_total:
        raise UsageError(
            f"--use-checkpoint-opt-param-scheduler keeps the checkpoint's {saved.training.train_tokens:,.0f} tokens,"
            " but --train-iters or --train-tokens is another length; leave one of them out",
            same_on_all_ranks=True,
        )
    config.optimizer.lr = saved.learning_rate().value
    for name in KEPT_BY_FLAG:
        setattr(config.optimizer, name, getattr(saved.optimizer, name))


def _keeps_length(given: Config, saved: Config, schedule: Schedule, resolve: Resolve) -> bool:
    """Whether the settings of the length are those of the checkpoint, whatever the batch size."""
    iterations, tokens = given.training.train_iters, given.training.train_tokens
    if iterations in schedule.total.settings and (tokens is None or tokens == saved.training.train_tokens):
        return True
    return _without_parts(given, resolve).training.train_tokens == saved.training.train_tokens


def _without_parts(config: Config, resolve: Resolve) -> Config:
    """Resolve a config without warm-up and decay, which are in batches of a size that may not be the one of now."""
    config = copy.deepcopy(config)
    config.optimizer.lr_warmup_iters, config.optimizer.lr_wsd_decay_iters = 0, None
    return resolve(config)


def check_end(folder: Any, config: Config, saved: Config, schedule: Schedule, consumed_samples: int) -> None:
    """Refuse a length that the checkpoint has already exceeded.

    Args:
        folder: of the checkpoint, for the message.
        config: of the run that resumes.
        saved: of the checkpoint.
        schedule: of the run that resumes.
        consumed_samples: sequences that the checkpoint has been trained on.

    Raises:
        UsageError: the run is to be shorter than that, by settings other than the checkpoint's.
    """
    same_length = config.training.train_tokens == saved.training.train_tokens
    if not same_length and schedule.total.samples < consumed_samples:
        raise UsageError(
            f"the run is to end after {schedule.total.samples:,} sequences"
            f" ({config.training.train_iters} iterations of {config.training.global_batch_size}), but the checkpoint"
            f" {folder} has been trained on {consumed_samples:,}; raise --train-iters or --train-tokens, or load an"
            " earlier checkpoint",
            same_on_all_ranks=True,
        )


def remaining(schedule: Schedule, consumed_samples: int, iteration: int, batch: int) -> str:
    """Say what is left of a run that resumes.

    Args:
        schedule: of the run.
        consumed_samples: where it stands.
        iteration: where it stands.
        batch: sequences per iteration.
    """
    left = schedule.iterations_left(consumed_samples, batch)
    line = f"{consumed_samples:,} of {schedule.total.samples:,} sequences done"
    if not left:
        return line
    extra = consumed_samples + left * batch - schedule.total.samples
    return f"{line}; {left:,} iterations of {batch:,} to go, up to iteration {iteration + left:,}" + (
        f", the last of which exceeds the end by {extra:,}" if extra else ""
    )
