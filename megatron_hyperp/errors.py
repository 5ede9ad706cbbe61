"""How the command lines end: exit codes (docs/signals.md), one clear line, a traceback only on ``--debug``."""

from __future__ import annotations

import multiprocessing
import os
import stat
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_USAGE = 2
# Characters of a message: what a file of others holds may be quoted in it.
_LONGEST_MESSAGE = 4000
# Asked to stop before the end: the same command goes on from the checkpoint. EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
# A collective failed because another rank died or hung; nothing was saved. EX_PROTOCOL of sysexits.h.
EXIT_LOST_RANK = 76

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


def leave_at_once(code: int) -> NoReturn:
    """Exit without handlers, and without leaving processes behind that they would have ended (they hold its pipes)."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(code)


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a command line's ``main(argv)`` and exit: 0, its own code, 2 after a :class:`UsageError`, or 76.

    What it writes follows the umask, but is never writable to the whole machine: a checkpoint or an index that anyone
    may replace is one that nobody can trust.
    ``--debug`` anywhere in ``argv`` (it is taken out) shows the traceback of a usage error as well.
    Other exceptions are bugs or failures of the machine and keep their traceback.
    """
    os.umask(os.umask(0o077) | stat.S_IWOTH)
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        code = main(argv)
    except UsageError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not error.same_on_all_ranks:
            if debug:
                traceback.print_exc()
            who = "" if rank == 0 else f"[rank {rank}] "
            print(f"{who}error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_RANK_0)
        if "RANK" in os.environ:
            # A rank that fails alone must not wait in a process-group destructor for the others.
            leave_at_once(EXIT_USAGE)
        sys.exit(EXIT_USAGE)
    except LostRankError as error:
        if debug:
            traceback.print_exc()
        print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
        leave_at_once(EXIT_LOST_RANK)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
