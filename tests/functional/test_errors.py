"""How a command line ends: exit codes, one line of error, and who prints it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE, TOGETHER = "UsageError('no good')", "UsageError('no good', same_on_all_ranks=True)"


def script(body: str) -> str:
    """A command line whose ``main(argv)`` is ``body``."""
    return (
        "import os, sys, time\n"
        "from megatron_hyperp import errors\n"
        "from megatron_hyperp.errors import UsageError, run_command\n"
        f"def main(argv):\n    {body}\n"
        "run_command(main)\n"
    )


def run(body: str, *argv: str, rank: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    if rank is not None:
        environment["RANK"] = str(rank)
    return subprocess.run(
        [sys.executable, "-c", script(body), *argv], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return 0", 0), ("return 3", 3), ("sys.exit(4)", 4)])
def test_return_codes_pass(body: str, code: int) -> None:
    process = run(body)
    assert (process.returncode, process.stdout, process.stderr) == (code, "", "")


def test_main_gets_the_arguments_without_debug() -> None:
    assert run("print(argv)", "--a", "1", "--debug", "b").stdout == "['--a', '1', 'b']\n"


@pytest.mark.parametrize(
    ("error", "rank", "stderr"),
    [
        (ALONE, None, "error: no good\n"),
        (ALONE, 0, "error: no good\n"),
        (ALONE, 1, "[rank 1] error: no good\n"),
        (TOGETHER, None, "error: no good\n"),
        (TOGETHER, 0, "error: no good\n"),
        (TOGETHER, 1, ""),
    ],
)
def test_usage_error_is_one_line(error: str, rank: int | None, stderr: str) -> None:
    process = run(f"errors.SECONDS_FOR_RANK_0 = 0.1; print('before'); raise {error}", rank=rank)
    assert (process.returncode, process.stdout, process.stderr) == (2, "before\n", stderr)


def test_a_slow_rank_0_still_prints_under_a_launcher(tmp_path: Path) -> None:
    body = f"errors.SECONDS_FOR_RANK_0 = 60.0; time.sleep(os.environ['RANK'] == '0'); raise {TOGETHER}"
    (tmp_path / "tool.py").write_text(script(body))
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "tool.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    # Importing torchrun takes seconds, too, of a busy machine.
    assert time.monotonic() - started < 60.0
    assert process.returncode != 0
    assert process.stderr.splitlines().count("error: no good") == 1


@pytest.mark.parametrize(("error", "rank"), [(ALONE, None), (ALONE, 1), (TOGETHER, 0)])
def test_debug_shows_the_traceback_too(error: str, rank: int | None) -> None:
    process = run(f"raise {error}", "--debug", rank=rank)
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].endswith("error: no good")
    assert len([line for line in lines if " error: " in f" {line}"]) == 1


def test_a_rank_does_not_wait_for_its_exit_handlers() -> None:
    """What a process group does at exit may wait for other ranks."""
    handler = "import atexit; atexit.register(print, 'at exit')"
    assert run(f"{handler}; raise {ALONE}", rank=1).stdout == ""
    assert run(f"{handler}; raise {ALONE}").stdout == "at exit\n"


def test_other_errors_keep_their_traceback() -> None:
    process = run("raise ValueError('a bug')")
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")
    assert "ValueError: a bug" in process.stderr


def test_an_interrupt_is_no_traceback() -> None:
    process = run("raise KeyboardInterrupt")
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ALONE, 2, "error: no good"),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
        ("SystemExit(7)", 7, ""),
        ("KeyboardInterrupt('after iteration 3')", 130, "interrupted: after iteration 3"),
    ],
)
def test_a_child_process_does_not_delay_the_end(error: str, code: int, message: str, rank: int | None) -> None:
    """Data-loading processes ignore the signal with which multiprocessing would end them."""
    child = (
        "import multiprocessing, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " multiprocessing.get_context('fork').Process(target=time.sleep, args=(10,), daemon=True).start()"
    )
    started = time.monotonic()
    process = run(f"{child}; raise {error}", rank=rank)
    assert time.monotonic() - started < 8
    assert process.returncode == code
    assert (process.stderr.splitlines() or [""])[-1].removeprefix("[rank 1] ") == message


def test_bad_flags_of_the_example_end_in_one_line() -> None:
    process = subprocess.run(
        [sys.executable, ROOT / "examples" / "pretrain_gpt.py", "--hiden-size", "5"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line == "error: unrecognized arguments: --hiden-size 5; did you mean --hidden-size? (--help lists the flags)"
