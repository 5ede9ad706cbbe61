"""Signs of life, one small file per rank, and what they tell when a collective fails: which rank is behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hyperp.errors import LostRankError, UsageError
from megatron_hyperp.files import write_atomically

FOLDER = "heartbeats"
# Intervals without a sign after which a rank is taken for stopped.
MOST_MISSED = 2.5
# What gloo, torch's store and NCCL say when the other end is gone or silent.
_LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Timed out waiting|Broken pipe|NCCL communicator"
    r"|clients joined|wait timeout|got 0 bytes|Connection refused|connectFullMesh|socket has timed out"
)


class Heartbeats:
    """Writes ``rank_N`` every few seconds, in a thread, so that a rank that waits still beats; reads those of others.

    Args:
        run_dir: of the run.
        rank: of this process.
        interval: seconds between beats; 0: none are written.
        position: returns the last iteration done and the phase of the loop.
    """

    def __init__(
        self, run_dir: str | Path, rank: int, interval: float, position: Callable[[], tuple[int, str]]
    ) -> None:
        self._folder = Path(run_dir) / FOLDER
        self._rank = rank
        self._interval = interval
        self._position = position
        self._over = threading.Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat until the block ends."""
        thread = threading.Thread(target=self._work, daemon=True)
        if self._interval:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            if self._interval:
                thread.join()

    def _work(self) -> None:
        while True:
            self.beat()
            if self._over.wait(self._interval):
                return

    def beat(self) -> None:
        """Replace this rank's file; a full disk costs the sign, not the run."""
        iteration, phase = self._position()
        with contextlib.suppress(UsageError):
            write_atomically(
                self._folder / f"rank_{self._rank}", json.dumps({"iteration": iteration, "phase": phase}) + "\n"
            )

    def behind(self) -> str | None:
        """Say which rank is silent or has done fewer iterations than this one; None if no file tells.

        Ages are between times that the file system gave, since clocks of nodes differ.
        """
        if not self._interval:
            return None
        self.beat()
        now = (self._folder / f"rank_{self._rank}").stat().st_mtime
        signs = []
        for path in self._folder.glob("rank_*"):
            with contextlib.suppress(OSError, ValueError):
                if re.fullmatch(r"rank_[0-9]+", path.name):
                    row = json.loads(path.read_text())
                    signs.append((int(path.name[5:]), row["iteration"], row["phase"], now - path.stat().st_mtime))
        silent = [sign for sign in signs if sign[3] > MOST_MISSED * self._interval]
        if silent:
            rank, iteration, phase, age = max(silent, key=lambda sign: sign[3])
            return f"rank {rank} gave its last sign {age:.0f} s ago, after iteration {iteration} ({phase})"
        rank, iteration, phase, _ = min(signs, key=lambda sign: sign[1], default=(0, self._position()[0], "", 0.0))
        return f"rank {rank} has done {iteration} iterations ({phase})" if iteration < self._position()[0] else None

    def explain(self, error: BaseException) -> str | None:
        """Say in one line what a failed collective of the training means; None if the error is none."""
        # Only after a long wait do the signs tell who is behind: they are an interval old.
        guess = self.behind if "imed out" in str(error) else lambda: None
        return explain(error, f"in iteration {self._position()[0] + 1}", guess)


def explain(error: BaseException, when: str, guess: Callable[[], str | None] = lambda: None) -> str | None:
    """Say in one line what a failed collective means; None if the error is none.

    Args:
        error: that ended this rank.
        when: it came, in words.
        guess: says which rank is behind, if that is known.
    """
    if isinstance(error, UsageError | LostRankError) or not _LOST.search(str(error)):
        return None
    told = re.sub(r"^\[\S*:[0-9]+\] ", "", " ".join(str(error).split())).split(". ")[0][:120]
    return (
        f"{_collective(error)} {when} failed: another rank died, or hung for --distributed-timeout-minutes ({told});"
        f" {guess() or 'the launcher names a rank that died'}"
    )


def clear(run_dir: str | Path) -> None:
    """Drop the signs of an earlier run, which may have had more ranks."""
    shutil.rmtree(Path(run_dir) / FOLDER, ignore_errors=True)


def _collective(error: BaseException) -> str:
    """Name the torch.distributed function that failed, or the function that waited for one."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.name for frame in frames if frame.filename.endswith("distributed_c10d.py")]
    names = [name for name in inside if name != "wrapper"] or [frame.name for frame in frames]
    return names[-1] if names else "a collective"
