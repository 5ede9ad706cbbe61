"""One run: model, optimizer, schedule and data are built, a checkpoint resumed, and the loop over batches trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.config import Config, micro_batches
from megatron_hyperp.data import batches as micro
from megatron_hyperp.data.datasets import build_datasets
from megatron_hyperp.data.mock import mock_datasets
from megatron_hyperp.training import checkpointing, heartbeats
from megatron_hyperp.training.alarms import ACTIONS, Alarms
from megatron_hyperp.training.checkpointing import Progress
from megatron_hyperp.training.compatibility import changed_settings, weights_notes
from megatron_hyperp.training.description import describe
from megatron_hyperp.training.divergence import Divergence, check_loaded
from megatron_hyperp.training.forward import Batches, forward_step
from megatron_hyperp.training.lineage import Lineage, record_branch, trace
from megatron_hyperp.training.logging import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, Console, MetricsWriter
from megatron_hyperp.training.meter import Meter
from megatron_hyperp.training.phases import Phases
from megatron_hyperp.training.profiling import FOLDER, Profiler
from megatron_hyperp.training.replicas import Replicas
from megatron_hyperp.training.saving import Saved, Saver
from megatron_hyperp.training.schedule import Schedule, remaining, samples_of
from megatron_hyperp.training.setup import build, initialize_megatron
from megatron_hyperp.training.signals import StopRequests


class Trainer:
    """One run: model, optimizer, schedule, data, and the loop over them.

    Args:
        config: resolved config.
        tokenizer: of the data.
        resume_from: checkpoint folder, or None to start from scratch.
        schedule: of a run that resumes; None for a new one, whose config it follows from.
    """

    def __init__(
        self, config: Config, tokenizer: Any, resume_from: Path | None, schedule: Schedule | None = None
    ) -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from megatron_hyperp.model.build import build_balance
        from megatron_hyperp.model.delayed import build_scales
        from megatron_hyperp.training.stability import Stability

        self.config = config
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.phases = Phases()
        self.console = Console(active=self.rank == 0, quiet=config.logging.quiet)
        initialize_megatron(config)
        for line in describe(config, self.world_size):
            self.console.print(line)
        self.balance, self.scales = build_balance(config), build_scales(config)
        common = {} if resume_from is None else checkpointing.common_state(resume_from)
        weights_only = resume_from is not None and checkpointing.takes_weights_only(config, common)
        self.radii = common.get(checkpointing.RADII)
        self.chunks, self.optimizer = build(config, self.balance, self.scales, radii=self.radii, log=self.console.print)
        self.stability = Stability(config, self.chunks, self.optimizer, self.balance)
        self._time_communication()
        self.schedule = schedule or Schedule.of(config)
        options, peak = config.optimizer, config.learning_rate().value
        unit = self.schedule.unit(config.training.global_batch_size)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=peak,
            min_lr=options.min_lr,
            lr_warmup_steps=self.schedule.warmup.samples // unit,
            lr_decay_steps=self.schedule.total.samples // unit,
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            wsd_decay_steps=self.schedule.wsd_decay.samples // unit,
            lr_wsd_decay_style="linear",
        )
        self.stop_requests = StopRequests(config.training.exit_duration_in_mins, self.phases.started)
        self.optimizer.ballot = self.stop_requests.ballot
        # Why the run stopped before its end, if it was asked to.
        self.stopped: str | None = None
        self.heartbeats = heartbeats.Heartbeats(
            config.logging.run_dir,
            self.rank,
            config.logging.heartbeat_interval,
            lambda: (self.progress.iteration, self.phases.current),
        )
        self.report_alive: Callable[[], None] = lambda: None
        self.divergence = Divergence(self, None if weights_only else resume_from)
        self.progress, self.lineage = Progress(), Lineage()
        if resume_from is not None:
            self.progress = checkpointing.load_checkpoint(
                *(config, resume_from, self.chunks, self.optimizer, self.balance, self.scales),
                weights_only=weights_only,
            )
            check_loaded(self, resume_from)
            # The rounding matters only where the length of sequences has changed.
            self.progress.consumed_samples = samples_of(self.progress.consumed_tokens, config.model.seq_length)
            self._set_learning_rate()
            self.lineage = trace(config, resume_from, common, weights_only=weights_only)
            kind, what = ("started", "with the weights of") if weights_only else ("resumed", "from")
            origin = f"{what} {self.lineage.describe(resume_from)}"
            self.console.print(f"{kind} {origin} at iteration {self.progress.iteration}")
            if not weights_only:
                self._print_continuation()
            for line in (weights_notes if weights_only else changed_settings)(resume_from, config):
                self.console.print(f"note: {line}")
        batch, consumed = config.training.global_batch_size, self.progress.consumed_samples
        self.last_iteration = self.progress.iteration + self.schedule.iterations_left(consumed, batch)
        self.console.set_end(self.last_iteration, self.schedule.total.samples * config.model.seq_length)
        self._build_data(tokenizer)
        self.writer = MetricsWriter(
            *(config, self.progress.iteration),
            active=self.rank == 0,
            fresh=not self.lineage.continued,
            run_id=self.lineage.run_id,
            parent=self.lineage.parent,
        )
        if self.rank == 0:
            checkpointing.write_run_config(config)
            record_branch(config, self.lineage, self.writer.run_id)
        if resume_from is not None:
            self.writer.event(self.progress.iteration, kind, origin)
        interval = config.training.check_weight_hash_across_dp_replicas_interval
        self.replicas = Replicas(interval, self.optimizer, self.balance, self.scales, event=self.writer.event)
        self.saver = self._build_saver()
        self.alarms = Alarms(config.logging.alarm)
        self.profiler = Profiler(config, self.rank)
        self._losses: dict[int, float] = {}

    def _print_continuation(self) -> None:
        """Print what is left of a run that resumes."""
        progress = self.progress
        batch = self.config.training.global_batch_size
        self.console.print(remaining(self.schedule, progress.consumed_samples, progress.iteration, batch))
        self.console.print(f"learning rate at this point of the schedule: {self._base_lr():.6g}")

    def _set_learning_rate(self) -> None:
        """Set learning rates and weight decay to those of the sequences trained so far."""
        unit = self.schedule.unit(self.config.training.global_batch_size)
        self.scheduler.num_steps = self.progress.consumed_samples / unit
        self.scheduler.step(0)

    def _time_communication(self) -> None:
        """Count gradients on their way to owners, and weights on their way back, as a phase of their own."""
        around, exchange = partial(self.phases.around, "communication"), self.optimizer.exchange
        for owner, name in [
            *((chunk, "finish_grad_sync") for chunk in self.chunks),
            (exchange, "start_param_sync"),
            (exchange, "finish_param_sync"),
        ]:
            setattr(owner, name, around(getattr(owner, name)))

    def _build_data(self, tokenizer: Any) -> None:
        data, training, model = self.config.data, self.config.training, self.config.model
        evaluated = training.eval_iters * training.global_batch_size if training.eval_interval else 0
        num_samples = (self.schedule.total.samples, evaluated, evaluated)
        if data.mock_data:
            sets = mock_datasets(
                seq_length=model.seq_length,
                vocab_size=model.vocab_size if tokenizer is None else tokenizer.vocab_size,
                seed=training.seed,
                num_samples=num_samples,
            )
        else:
            sets = build_datasets(
                data_path=data.data_path,
                split=data.split,
                seq_length=model.seq_length,
                seed=training.seed,
                num_samples=num_samples,
                tokenizer=tokenizer,
                cache_path=data.data_cache_path,
                eod_mask_loss=data.eod_mask_loss,
                note=self.console.print,
            )
        train_set, self.valid_set, self.test_set = sets
        assert train_set is not None
        end = self.progress.consumed_samples + training.global_batch_size * (
            self.last_iteration - self.progress.iteration
        )
        self.train_set = micro.filled_up(train_set, planned=self.schedule.total.samples, length=end)

    def _batches(self, dataset: Any, consumed_samples: int) -> list[Batches]:
        """Return one iterator per pipeline chunk: the interleaved schedule draws from each on its own."""
        from megatron.core import parallel_state

        return [
            iter(
                micro.batches(
                    dataset,
                    consumed_samples=consumed_samples,
                    micro_batch_size=self.config.training.micro_batch_size,
                    data_parallel_rank=parallel_state.get_data_parallel_rank(),
                    data_parallel_size=parallel_state.get_data_parallel_world_size(),
                    num_workers=self.config.data.num_workers,
                    pin_memory=device.has_cuda(),
                )
            )
            for _ in self.chunks
        ]

    def train(self) -> Progress:
        """Run to the last iteration, to ``--exit-interval``, or until asked to stop; save there."""
        config, training = self.config, self.config.training
        if self.progress.iteration >= self.last_iteration:
            self.console.print(
                f"nothing to do: all {self.schedule.total.samples:,} sequences of the run are done, at iteration"
                f" {self.progress.iteration}"
            )
            return self.progress
        batches = self._batches(self.train_set, self.progress.consumed_samples)
        self.replicas.check(self.progress.iteration, f"at the start, at iteration {self.progress.iteration}")
        if self.progress.iteration == 0:
            self.evaluate()
        self.console.start_bar(self.progress.iteration)
        meter = Meter(self)
        while self.progress.iteration < self.last_iteration:
            lr, watched = self._base_lr(), self.stability.due(self.progress.iteration + 1)
            self.profiler.before(self.progress.iteration + 1)
            with self.stability.watch() if watched else nullcontext():
                with self.phases.phase("forward-backward"):
                    losses = self._train_batch(batches)
                self.replicas.check_step(self.progress.iteration + 1)
                with self.phases.phase("optimizer"):
                    _, grad_norm, _ = self.optimizer.step()
            self.divergence.check()
            self.progress.iteration += 1
            self.progress.consumed_samples += training.global_batch_size
            self.progress.consumed_tokens += config.batch_tokens
            self._set_learning_rate()
            self.report_alive()
            meter.add(losses, lr, grad_norm)
            self.divergence.count()
            iteration, last = self.progress.iteration, self.progress.iteration == self.last_iteration
            self.stopped = None if last else self.stop_requests.reason(self.optimizer.votes)
            stopping = last or bool(training.exit_interval and iteration % training.exit_interval == 0)
            stopping = stopping or self.stopped is not None
            self.profiler.after(iteration)
            row = self._report(meter, watched=watched, logged=iteration % config.logging.log_interval == 0 or stopping)
            # Who sent a signal may not wait long: the checkpoint comes first.
            if training.eval_interval and not self.stopped and (iteration % training.eval_interval == 0 or last):
                with meter.paused(), self.phases.phase("evaluation"):
                    row["eval_loss"] = self.evaluate()
            wish = self._sound(row) if self.alarms and row else "warn"
            stopping = stopping or wish == "stop"
            interval = config.checkpoint.save_interval
            if self.saver and (stopping or wish == "save" or (interval and iteration % interval == 0)):
                with meter.paused(), self.phases.phase("checkpoint"):
                    self._save()
            elif self.saver:
                self.saver.poll()
            if stopping:
                break
        if self.saver:
            with self.phases.phase("checkpoint"):
                self.saver.finish()
        if self.progress.iteration == self.last_iteration and not self.stopped:
            with self.phases.phase("evaluation"):
                self.test()
        self.console.stop_bar()
        if self.stopped:
            self.console.print(f"stopping: {self.stopped}", important=True)
            self.writer.event(self.progress.iteration, "stopped", self.stopped)
        self._summarize()
        return self.progress

    def _report(self, meter: Meter, *, watched: bool, logged: bool) -> dict[str, Any]:
        """Write what there is to say of this iteration, and return it all in one row."""
        said: dict[str, Any] = {}
        with self.phases.phase("reports"):
            if watched:
                position = {"iteration": self.progress.iteration, "tokens": self.progress.consumed_tokens}
                said = {**position, **self.stability.collect()}
                self.writer.write(said)
            if logged:
                said = {**said, **meter.report()}
        return said

    def _sound(self, row: dict[str, Any]) -> str:
        """Check alarms; return the gravest action that they ask for.

        Rank 0 decides for all: ranks differ in what they measure of time.
        """
        gravest = 0
        for alarm, line in self.alarms.check(row):
            gravest = max(gravest, ACTIONS.index(alarm.action))
            self.console.print(f"{line} at iteration {self.progress.iteration}", important=True)
            self.writer.event(self.progress.iteration, "alarm", line)
        decided = torch.tensor(gravest, device=device.device())
        dist.broadcast(decided, 0)
        return ACTIONS[int(decided)]

    def _summarize(self) -> None:
        """Print where the run stands, where its time went, and where its files are."""
        config = self.config
        say = partial(self.console.print, important=True)
        say(f"stopped at iteration {self.progress.iteration} of {self.last_iteration}")
        if self._losses:
            best = min(self._losses, key=lambda iteration: self._losses[iteration])
            say(f"best held-out loss {self._losses[best]:.4f} at iteration {best}")
        say(f"time: {self.phases.describe()}")
        folder = Path(config.logging.run_dir)
        files = [name for name in (METRICS_FILE, EVENTS_FILE, CONFIG_FILE, FOLDER) if (folder / name).exists()]
        say(
            f"files: {', '.join(str(folder / name) for name in files)}"
            + (f"; checkpoints in {config.checkpoint.save}" if config.checkpoint.save else "")
        )

    def _base_lr(self) -> float:
        """The learning rate of tensors whose multiplier is 1."""
        return float(self.scheduler.get_lr({}))

    def _train_batch(self, batches: list[Batches]) -> torch.Tensor:
        """Run a global batch forward and backward, the routers' loads counted; return as :meth:`_forward_backward`."""
        if self.balance is None:
            return self._forward_backward(batches, forward_only=False)
        if self.config.moe.moe_balance_statistics == "exact":
            held = [
                list(itertools.islice(iterator, micro_batches(self.config, self.world_size))) for iterator in batches
            ]
            self.balance.looks_ahead = True
            with torch.no_grad():
                self._forward_backward([iter(chunk) for chunk in held], forward_only=True)
            self.balance.looks_ahead = False
            self.balance.finish()
            batches = [iter(chunk) for chunk in held]
        losses = self._forward_backward(batches, forward_only=False)
        self.balance.finish()
        return losses

    def _forward_backward(self, batches: list[Batches], *, forward_only: bool) -> torch.Tensor:
        """Run one global batch; return this rank's [sum of losses, tokens], zeros but on the last pipeline stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        training = self.config.training
        if not forward_only:
            self.optimizer.zero_grad()
        step = partial(forward_step, draw=self.phases.around("data", next))
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=micro_batches(self.config, self.world_size),
            seq_length=self.config.model.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
        )
        if self.scales is not None and not forward_only:
            self.scales.finish()
        zero = torch.zeros(2, dtype=torch.float64, device=device.device())
        return sum((output["loss"] for output in outputs), zero)

    def global_mean(self, losses: torch.Tensor) -> float:
        """Mean loss per token from every rank's [sum, tokens]; a collective call, equal on all ranks."""
        from megatron.core import parallel_state

        # The ranks of a tensor-parallel group hold the same sums: count one of them.
        counted = losses if parallel_state.get_tensor_model_parallel_rank() == 0 else torch.zeros_like(losses)
        counted = counted.clone()
        dist.all_reduce(counted)
        return float(counted[0] / counted[1])

    def evaluate(self) -> float | None:
        """Return and write the held-out loss over the same ``eval_iters`` batches each time; None without any."""
        if self.valid_set is None or not self.config.training.eval_interval or not self.config.training.eval_iters:
            return None
        loss = self._loss_on(self.valid_set, "eval_loss")
        self._losses[self.progress.iteration] = loss
        self.console.print(f"held-out loss {loss:.4f} at iteration {self.progress.iteration}")
        return loss

    def test(self) -> None:
        """Write the loss over ``eval_iters`` batches of the test set, if there is one, at the end of the run."""
        if self.test_set is not None:
            loss = self._loss_on(self.test_set, "test_loss")
            self.console.print(f"test loss {loss:.4f} at iteration {self.progress.iteration}", important=True)

    def _loss_on(self, dataset: Any, name: str) -> float:
        """Return and write the mean loss per token over the first ``eval_iters`` batches of a dataset."""
        for chunk in self.chunks:
            chunk.eval()
        batches = self._batches(dataset, 0)
        losses = torch.zeros(2, dtype=torch.float64, device=device.device())
        with torch.no_grad():
            for _ in range(self.config.training.eval_iters):
                losses += self._forward_backward(batches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        loss = self.global_mean(losses)
        row = {"iteration": self.progress.iteration, "tokens": self.progress.consumed_tokens, name: loss}
        self.writer.write(row)
        return loss

    def _build_saver(self) -> Saver | None:
        parts = self.chunks, self.optimizer, self.balance, self.scales
        known: dict[str, Any] = {"radii": self.radii, "parent": self.lineage.parent, "schedule": self.schedule}
        return Saver(self.config, *parts, **known, said=self._saved) if self.config.checkpoint.save else None

    def _save(self) -> None:
        assert self.saver is not None
        self.replicas.check(self.progress.iteration, f"before the save of iteration {self.progress.iteration}")
        # After a step that was left out, the weights may be the cause: then no older checkpoint is dropped.
        keep_all = self.optimizer.fault is not None
        self.saver.save(self.progress, run_id=self.writer.run_id, keep_all=keep_all)

    def rescue(self) -> None:
        """Save where the run stands before an error ends it, and wait until that is done.

        Raises:
            UsageError: as :meth:`Saver.save`, or replicas differ.
        """
        assert self.saver is not None
        self._save()
        self.saver.finish()

    def _saved(self, saved: Saved) -> None:
        waited = f", {saved.waited:.1f} s of them without training" if self.config.checkpoint.async_save else ""
        self.console.print(f"saved {saved.folder} in {saved.seconds:.1f} s{waited}")
        self.writer.event(saved.iteration, "saved", str(saved.folder))
        self.divergence.saved(saved.folder)

    def close_reports(self) -> None:
        """Stop the progress bar, flush and close what writes metrics and traces."""
        self.console.stop_bar()
        self.profiler.close()
        self.writer.close()

    def leave_groups(self) -> None:
        """Destroy the process groups; every rank must come here."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
