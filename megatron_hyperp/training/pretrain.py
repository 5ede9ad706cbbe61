"""Pretraining: from a config to a trained model. Reads top to bottom: check, join, agree, train."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.data.batches import is_lost_process, lost_process
from megatron_hyperp.errors import EXIT_STOPPED, LostRankError, UsageError
from megatron_hyperp.training import heartbeats, run_lock
from megatron_hyperp.training.agreement import agree
from megatron_hyperp.training.loop import Trainer
from megatron_hyperp.training.preflight import check, planned, verify
from megatron_hyperp.training.resiliency import launcher_reports
from megatron_hyperp.training.schedule import Schedule

# What a disk says that is full, read-only, broken or gone.
DISK_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOTDIR}


def pretrain(config: Config, *, world_size: int) -> int:
    """Train as the config says; every rank of the job calls this.

    Args:
        config: not yet resolved.
        world_size: ranks of the job.

    Returns:
        The exit code: 0, or ``EXIT_STOPPED`` after a signal or ``--exit-duration-in-mins``.

    Raises:
        UsageError: bad input, before training starts; or gradients that stay non-finite.
        LostRankError: a collective of the training failed, because another rank died or hangs; or a process that loads
            data died.
    """
    given = config
    config, tokenizer, found, schedule = check(given, world_size)
    device.adapt_megatron()
    try:
        device.init_process_group(config.parallel.distributed_timeout_minutes, run=config.logging.run_dir)
        with run_lock.held(config):
            return _pretrain(given, config, tokenizer, found, schedule)
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        where = error.filename or config.logging.run_dir
        raise UsageError(
            f"{where}: {error.strerror}; mend the disk or name another place, and go on from the last checkpoint"
        ) from error
    except RuntimeError as error:
        message = heartbeats.explain(error, "before the first iteration, or after the last one,")
        if message is None:
            raise
        raise LostRankError(message) from error


def _pretrain(given: Config, config: Config, tokenizer: Any, found: Path | None, schedule: Schedule) -> int:
    """Train into folders that this job alone writes; see :func:`pretrain`."""
    if dist.get_rank() == 0:
        heartbeats.clear(config.logging.run_dir)
    agree(config, found)
    resume_from = verify(config, found)
    if resume_from != found:
        # From an older checkpoint than the one that was found, another schedule may follow.
        prepend_bos = config.data.prepend_bos
        config, schedule = planned(given, dist.get_world_size(), tokenizer, resume_from)
        config.data.prepend_bos = prepend_bos
    trainer = Trainer(config, tokenizer, resume_from, schedule)
    with trainer.stop_requests.listening(), trainer.heartbeats.beating(), launcher_reports() as trainer.report_alive:
        try:
            trainer.train()
        except KeyboardInterrupt as error:
            done = trainer.progress.iteration
            raise KeyboardInterrupt(
                f"after iteration {done}, without a save (SIGTERM and SIGUSR1 save first)"
            ) from error
        except BaseException as error:  # what saving raises is no Exception
            if is_lost_process(error):
                raise lost_process(error) from error
            if message := trainer.heartbeats.explain(error):
                raise LostRankError(message) from error
            raise
        finally:
            trainer.close_reports()
        # A launcher ends all ranks when the first one leaves with another code than 0: rank 0 may not be done yet.
        if trainer.stopped:
            dist.barrier()
    # Only after success: a rank that fails alone must not wait for the others in the process groups' destructors.
    trainer.leave_groups()
    return EXIT_STOPPED if trainer.stopped else 0
