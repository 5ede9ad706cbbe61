"""How the command lines end: exit codes (docs/signals.md), one clear line, a traceback only on ``--debug``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

EXIT_USAGE = 2
# Characters of a message: what a file of others holds may be quoted in it.
_LONGEST_MESSAGE = 4000
# Asked to stop before the end: the same command goes on from the checkpoint. EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
# A collective failed because another rank died or hung; nothing was saved. EX_PROTOCOL of sysexits.h.
EXIT_LOST_RANK = 76
# SIGINT, from the keyboard or from another process: 128 + its number, as shells report it.
EXIT_INTERRUPTED = 130

# A launcher ends all ranks when the first one fails: those that leave an error to rank 0 give it this time to print it.
SECONDS_FOR_RANK_0 = 10.0


class UsageError(ValueError):
    """Input that the user can mend: what was given, what is allowed, how to mend it.

    Args:
        message: one line, without a trailing full stop; control characters in what it quotes are escaped, so that no
            file can write to a terminal.
        same_on_all_ranks: every rank raises this same error (a wrong flag, say), so rank 0 alone prints it.
    """

    def __init__(self, message: str, *, same_on_all_ranks: bool = False) -> None:
        super().__init__(printable(message[:_LONGEST_MESSAGE]))
        self.same_on_all_ranks = same_on_all_ranks


def printable(text: str) -> str:
    """Return text with control characters, line breaks among them, and broken Unicode escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class LostRankError(RuntimeError):
    """Another rank, or a process that this one needs, died or hangs: it cannot go on; the message is one line."""


def has_children() -> bool:
    """Whether :mod:`multiprocessing` would wait for child processes at exit."""
    return bool(multiprocessing.active_children())


def leave_at_once(code: int) -> NoReturn:
    """Exit without handlers; child processes, which hold this one's pipes and sockets, are killed."""
    try:
        for stream in (sys.stdout, sys.stderr):
            # The reader of a pipe may be gone, or the disk full.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises an exception when a data-loading process ends.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(code)


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a command line's ``main(argv)`` and exit: 0, its own code, 2 after a :class:`UsageError`, 76, or 130.

    What it writes follows the umask, but is never writable to the whole machine: a checkpoint or an index that anyone
    may replace is one that nobody can trust.
    ``--debug`` anywhere in ``argv`` (it is taken out) shows the traceback of a usage error as well.
    Other exceptions are bugs or failures of the machine and keep their traceback.
    The version of Megatron-Core is checked before ``main``, so a program must not import Megatron-Core before.

    After an exception, a rank of several and a process with child processes exit at once: the destructor of a process
    group may wait for other ranks, and :mod:`multiprocessing` waits at exit for children that nothing ends.
    """
    os.umask(os.umask(0o077) | stat.S_IWOTH)
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        _check_versions()
        code = main(argv)
    except BaseException as error:
        code = _exit_code(error)
        try:
            # The disk that is full may be that of the log.
            with contextlib.suppress(OSError, ValueError):
                _report(error, debug=debug)
        finally:
            if isinstance(error, LostRankError) or "RANK" in os.environ or has_children():
                leave_at_once(code)
    sys.exit(code or 0)


def _check_versions() -> None:
    """Refuse a Megatron-Core that is too old or cannot be imported; warn about one that is newer than those tested."""
    from megatron_hyperp.megatron_compat import versions

    warning = versions.check_installed()
    if warning and os.environ.get("RANK", "0") == "0":
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    codes = {UsageError: EXIT_USAGE, LostRankError: EXIT_LOST_RANK, KeyboardInterrupt: EXIT_INTERRUPTED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def _report(error: BaseException, *, debug: bool) -> None:
    """Print why the command ends."""
    # As it is written: what is wrong may be this variable.
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if "RANK" in os.environ else ""
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        print(f"{who}interrupted{''.join(f': {word}' for word in error.args)}", file=sys.stderr, flush=True)
    elif isinstance(error, UsageError) and error.same_on_all_ranks and rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    else:
        if debug or not isinstance(error, UsageError | LostRankError):
            sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, UsageError):
            print(f"{who if rank != '0' else ''}error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LostRankError):
            print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
