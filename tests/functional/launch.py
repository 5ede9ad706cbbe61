"""Run the real entry point as users do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.training.logging import METRICS_FILE, read_metrics
from tests.run_distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "examples/pretrain_gpt.py"


def write_config(config: Config, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(arguments.to_yaml(config))
    return path


def command(config: Path, *flags: Any, ranks: int = 1) -> list[str]:
    """Return the command line: python for one rank, torchrun for more."""
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return [*python, ENTRY, "--config", str(config), *map(str, flags)]


def environment() -> dict[str, str]:
    """Environment of what tests launch; the scripts of examples take their Python from there."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHON": sys.executable}


def run(config: Path, *flags: Any, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Train and return what the command printed; the caller checks the exit code."""
    words = command(config, *flags, ranks=ranks)
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def train(config: Path, *flags: Any, ranks: int = 1, timeout: float = 240) -> str:
    """Train and return the output; a failure shows it."""
    result = run(config, *flags, ranks=ranks, timeout=timeout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def assert_same_run(found: Path, expected: Path, rows: int | None = None) -> None:
    """Two runs wrote the same metrics to the bit, but for their speed; so many rows, if that is given."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    assert len(ours) == len(theirs)
    assert rows in (None, len(ours))
    for row, other in zip(ours, theirs, strict=True):
        assert {**row, "tokens_per_s": 0.0} == {**other, "tokens_per_s": 0.0}


@contextmanager
def launched(words: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher; see that nothing is left at the end.

    Args:
        words: of the command.
        settings: environment variables.
    """
    environ = environment() | {name: str(value) for name, value in settings.items()}
    process = subprocess.Popen(words, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        for worker in workers(process) if process.poll() is None else []:
            worker.kill()
        process.kill()
        process.communicate()


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return torchrun's workers by rank; they are not the processes that load data for them."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(launcher.pid).children():
        # One that has just ended has neither.
        with suppress(psutil.Error):
            if ENTRY in child.cmdline() and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[str] | None) -> None:
    """Wait until a run has written so many rows of metrics; it must not end before, where its launcher is given."""
    deadline = time.monotonic() + 200
    while not (folder / METRICS_FILE).exists() or len(read_metrics(folder)) < rows:
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
