"""Run the real entry point as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
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
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def run(config: Path, *flags: Any, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Train and return what the command printed; the caller checks the exit code."""
    words = command(config, *flags, ranks=ranks)
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def train(config: Path, *flags: Any, ranks: int = 1) -> str:
    """Train and return the output; a failure shows it."""
    result = run(config, *flags, ranks=ranks)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
