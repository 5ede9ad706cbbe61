"""Bytes of a checkpoint, and how often to save one where GPUs fail.

J. W. Young, A first order approximation to the optimum checkpoint interval (1974): sqrt(2 C M), for saves of C seconds
and failures M seconds apart. J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps
(2006), takes it further, and gives the time that is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hyperp.config import Config

GB = 1e9


@dataclass(frozen=True, slots=True)
class Storage:
    """Where checkpoints go, and how often they are needed.

    Attributes:
        bytes_per_s: at which all ranks together save.
        gpu_mtbf_hours: hours of one GPU between failures that end the job, whatever fails.
        restart_minutes: from a failure to the next step.
    """

    bytes_per_s: float
    gpu_mtbf_hours: float
    restart_minutes: float


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often to save.

    Attributes:
        save_seconds: C, while which training waits.
        failure_hours: M, between two failures of the job.
        young_seconds: of training between two saves, sqrt(2 C M).
        daly_seconds: the same by Daly's estimate.
        steps: what that is in steps, for ``--save-interval``.
        lost: share of the time that saves, work done again and restarts take, by Daly's model.
    """

    save_seconds: float
    failure_hours: float
    young_seconds: float
    daly_seconds: float
    steps: int
    lost: float


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint's tensors: weights, fp32 masters and the optimizer's state, whole.

    Args:
        config: resolved for one rank.
    """
    # They import torch, which a command line does without until it trains.
    from megatron_hyperp.optimizer_options import routes_of
    from megatron_hyperp.planning.inventory import stage_parameters

    weight, total = (2 if config.training.bf16 else 4), 0
    for entry in routes_of(config, stage_parameters(config, 0)):
        total += (weight + 4) * entry.block.numel + entry.rule.state_bytes(*entry.block.shape)
    return total


def cadence(size: int, storage: Storage, gpus: int, step_seconds: float) -> Cadence:
    """Return how often to save a checkpoint.

    Args:
        size: of it, in bytes.
        storage: where it goes.
        gpus: that all must run.
        step_seconds: of one step.
    """
    save, mean = size / storage.bytes_per_s, 3600 * storage.gpu_mtbf_hours / gpus
    young = math.sqrt(2 * save * mean)
    ratio = save / (2 * mean)
    daly = young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save if ratio < 1 else mean
    steps = max(1, round(daly / step_seconds))
    worked = steps * step_seconds
    restart = 60 * storage.restart_minutes
    # In units of M; failures come as a Poisson process, during saves, too.
    wall = math.exp(min(restart / mean, 700)) * math.expm1(min((worked + save) / mean, 700))
    return Cadence(save, mean / 3600, young, daly, steps, 1 - worked / mean / wall)


def describe(size: int, storage: Storage | None, cadence: Cadence | None) -> str:
    """Return one line, or two, on checkpoints."""
    text = f"{size / GB:,.1f} GB"
    if storage is None or cadence is None:
        return text
    return (
        f"{text}, saved in {cadence.save_seconds:,.0f} s at {storage.bytes_per_s / GB:g} GB/s; a failure every"
        f" {cadence.failure_hours:,.1f} hours:\n"
        f"--save-interval {cadence.steps} ({cadence.daly_seconds / 60:,.1f} minutes; Young's"
        f" {cadence.young_seconds / 60:,.1f}), {cadence.lost:.1%} of the time lost"
    )
