"""Run the real entry point: on ranks that are forked warm, or as a user does, from a command line."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.training.logging import METRICS_FILE, read_metrics
from tests.run_distributed import ROOT, free_port, run_distributed, torchrun_environment, warm_context

# Seconds that the other ranks have to end once one has failed; a launcher would end them at once.
SECONDS_TO_END = 60.0
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
    """Train on ranks that are forked warm; the caller checks the exit code, the largest of all ranks'.

    The ranks have torchrun's environment if there are several, and no launcher: what a launcher adds is tested with
    :func:`launched`.
    """
    words = ["--config", str(config), *map(str, flags)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        port = free_port()
        environments = [
            environment() | (torchrun_environment(r, ranks, port) if ranks > 1 else {}) for r in range(ranks)
        ]
        processes = [
            warm_context().Process(target=run_entry, args=(words, ROOT, log, variables, _leave_errors_quickly))
            for log, variables in zip(logs, environments, strict=True)
        ]
        for process in processes:
            process.start()
        deadline, failed = time.monotonic() + timeout, False
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if not failed and any(process.exitcode for process in processes):
                deadline, failed = min(deadline, time.monotonic() + SECONDS_TO_END), True
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        output, errors = (
            "".join(log.with_suffix(suffix).read_text(errors="replace") for log in logs) for suffix in (".out", ".err")
        )
    assert not hung, f"ranks {hung} did not end: {output[-3000:]}{errors[-3000:]}"
    code = max((process.exitcode or 0 for process in processes), key=abs)
    return subprocess.CompletedProcess(words, code, output, errors)


def run_entry(
    words: Sequence[str], place: Path, log: Path, variables: dict[str, str], before: Callable[[], Any] | None = None
) -> None:
    """Run the entry point in this forked process, its output in files; it ends the process.

    Args:
        words: of the command line.
        place: working folder.
        log: where output goes, with the suffixes .out and .err.
        variables: the environment.
        before: called first.
    """
    os.environ.clear()
    os.environ |= variables
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(log.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(place)
    import torch

    from examples.pretrain_gpt import main
    from megatron_hyperp.errors import run_command

    torch.set_num_threads(1)
    if before is not None:
        before()
    run_command(main, list(words))


def _leave_errors_quickly() -> None:
    """Shorten the time that a rank gives rank 0 to print an error that all have: no launcher here ends rank 0."""
    from megatron_hyperp import errors

    errors.SECONDS_FOR_RANK_0 = 0.5


def train(config: Path, *flags: Any, ranks: int = 1, timeout: float = 240) -> str:
    """Train and return the output; a failure shows it."""
    result = run(config, *flags, ranks=ranks, timeout=timeout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def run_benchmark(main: Callable[[list[str]], Any], *words: Any) -> str:
    """Run a benchmark's ``main`` in a process that is forked warm, as from a command line: no launcher started it.

    Returns:
        What it printed. A forked process has the standard output of the server that it was forked from, not the test's.
    """
    (shown,) = run_distributed(_without_launcher, 1, main, list(map(str, words)))
    return str(shown)


def _without_launcher(main: Callable[[list[str]], Any], words: list[str]) -> str:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(words)
    return shown.getvalue()


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
