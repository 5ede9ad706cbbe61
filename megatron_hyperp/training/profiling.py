"""Traces of chosen iterations by PyTorch's profiler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError

FOLDER = "profile"
SHOWN = 30


def parse_range(text: str) -> tuple[int, int]:
    """Read ``FIRST:LAST``, iterations from 1, both included.

    Raises:
        UsageError: it is no such range.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--profile is {text!r}; give FIRST:LAST, two iterations from 1 on, such as 10:13")
    return first, last


def check(config: Config, world_size: int, last_iteration: int) -> None:
    """See that what is asked for will be profiled.

    Args:
        config: resolved.
        world_size: ranks of the job.
        last_iteration: at which the run ends.

    Raises:
        UsageError: the range is none or begins after the run's end, or a rank is none of the job's.
    """
    options = config.logging
    if not options.profile:
        return
    first, _ = parse_range(options.profile)
    if first > last_iteration:
        raise UsageError(
            f"--profile {options.profile} begins after the last of {last_iteration} iterations; begin earlier"
        )
    unknown = [rank for rank in options.profile_ranks if not rank.isdecimal() or int(rank) >= world_size]
    if unknown:
        raise UsageError(f"--profile-ranks {unknown[0]} is no rank of this job; there are 0 to {world_size - 1}")


class Profiler:
    """Profiles iterations ``--profile FIRST:LAST`` on the ranks of ``--profile-ranks``.

    Writes a trace for chrome://tracing or Perfetto, ``profile/rank0.trace.json`` in the run folder, and the operations
    that took most time, ``profile/rank0.json``.

    Args:
        config: resolved.
        rank: this one.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._range: tuple[int, int] | None = None
        if config.logging.profile and str(rank) in config.logging.profile_ranks:
            self._range = parse_range(config.logging.profile)
        self._stem = Path(config.logging.run_dir) / FOLDER / f"rank{rank}"
        self._running: Any = None

    def before(self, iteration: int) -> None:
        """Start if this is the first iteration to profile."""
        # A resumed run may begin amid them.
        if self._running is None and self._range and self._range[0] <= iteration <= self._range[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.has_cuda():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=activities)
            self._running.start()

    def after(self, iteration: int) -> None:
        """Stop and write if this was the last one."""
        if self._running is not None and self._range and iteration >= self._range[1]:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, if anything has."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(f"{self._stem}.trace.json")
        Path(f"{self._stem}.json").write_text(json.dumps(_top(running), indent=1))


def _top(profile: Any) -> list[dict[str, Any]]:
    """The operations that took most time by themselves, on the GPU if there is one."""
    cuda = device.has_cuda()
    rows = [
        {
            "operation": event.key,
            "calls": event.count,
            "self_ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3,
        }
        for event in profile.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["self_ms"])[:SHOWN]
