"""Jobs whose ranks come to harm: the real entry point on several ranks, faults planted in one of them.

The ranks are forked from a process that has imported everything, since a start from nothing takes ten seconds, and the
suite has hundreds. They do what torchrun's workers do, with its environment; the suite's own kills of real torchrun
workers are in ``test_kill.py``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from megatron_hyperp import checksums
from megatron_hyperp.errors import EXIT_STOPPED, EXIT_USAGE
from megatron_hyperp.training.checkpoint_folders import candidates, complete_checkpoints, iteration_of
from megatron_hyperp.training.logging import METRICS_FILE, read_events, read_metrics
from tests.faults.planting import STRUCK
from tests.functional.launch import assert_same_run, environment, run_entry
from tests.run_distributed import free_port, torchrun_environment, warm_context

# Runs in a rank before the entry point does.
Plant = Callable[[], Any]
# Seconds that a collective waits; and that all ranks may take to end once the first one has failed.
TIMEOUT = 20.0
SECONDS_TO_END = TIMEOUT + 40.0
SECONDS_TO_FINISH = 300.0
# A rank that was lost, or told of an error; a rank killed by the fault itself.
ENDS_WELL = {0, 2, 75, 76}


@dataclass
class Ending:
    """How the ranks of a job ended.

    Attributes:
        codes: exit codes by rank; negative: the signal.
        errors: what each wrote to its standard error.
        hung: ranks that had to be killed.
        seconds: from the fault, or the first failure of a rank where the fault's time is unknown, to the last end.
        left: process IDs of children that have outlived their ranks.
    """

    codes: list[int]
    errors: list[str]
    hung: list[int] = field(default_factory=list)
    seconds: float = 0.0
    left: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the error lines of all ranks."""
        return [line for text in self.errors for line in text.splitlines() if "error: " in line]


def _environment(rank: int, ranks: int, port: int, log: Path) -> dict[str, str]:
    return environment() | torchrun_environment(rank, ranks, port) | {STRUCK: str(log.with_suffix(".struck"))}


@dataclass
class Job:
    """A training that is started again after each fault.

    Attributes:
        place: the ranks' working folder, with the run folder ``run`` in it.
        config: its config file.
        flags: of the command line.
        ranks: of the job.
        logs: folder of the ranks' output; None: ``place``.
    """

    place: Path
    config: Path
    flags: tuple[Any, ...] = ()
    ranks: int = 2
    logs: Path | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.place / "run"

    def words(self) -> list[str]:
        """Return the command line."""
        # Relative, so that a copy of a run goes on as that run.
        places = ["--run-dir", "run", "--save", "run/checkpoints", "--load", "run/checkpoints"]
        return [str(word) for word in ("--config", self.config, *places, *self.flags)]

    def start(self, plants: dict[int, Plant] | None = None, words: dict[int, Sequence[str]] | None = None) -> Started:
        """Start all ranks; some with a fault planted, or with a command line of their own."""
        port = free_port()
        self.place.mkdir(exist_ok=True)
        logs = [(self.logs or self.place) / f"rank{rank}" for rank in range(self.ranks)]
        for log in logs:
            log.with_suffix(".struck").unlink(missing_ok=True)
        processes = [
            warm_context().Process(
                target=run_entry,
                args=(
                    (words or {}).get(rank, self.words()),
                    self.place,
                    logs[rank],
                    _environment(rank, self.ranks, port, logs[rank]),
                    (plants or {}).get(rank),
                ),
            )
            for rank in range(self.ranks)
        ]
        for process in processes:
            process.start()
        return Started(processes, logs, self.place)

    def run(
        self,
        plants: dict[int, Plant] | None = None,
        words: dict[int, Sequence[str]] | None = None,
        *,
        stopped: Sequence[int] = (),
    ) -> Ending:
        """Start all ranks and wait for their ends; as :meth:`Started.wait`."""
        return self.start(plants, words).wait(stopped=stopped)

    def rows(self) -> int:
        """Iterations whose metrics are written."""
        return len(read_metrics(self.folder)) if (self.folder / METRICS_FILE).exists() else 0

    def wait_for_rows(self, started: Started, rows: int) -> bool:
        """Wait until so many iterations have written metrics; return whether no rank ended before."""
        deadline = time.monotonic() + 120
        while self.rows() < rows:
            if not all(process.is_alive() for process in started.processes):
                return False
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return True

    def lost_checkpoints(self, keep: int = 2) -> int:
        """Bytes of the newest completed checkpoints, those that a run keeps, that are not there or not sound."""
        saved = [event["iteration"] for event in read_events(self.folder) if event["kind"] == "saved"]
        root = self.folder / "checkpoints"
        sound = {iteration_of(path): path for path in complete_checkpoints(root) if not checksums.faults(path)}
        size = max((_bytes(path) for path in root.glob("iter_*")), default=1)
        return sum(size for iteration in sorted(set(saved))[-keep:] if iteration not in sound)

    def resumes(self, straight: Path) -> int:
        """Start again, and see that the run ends as the undisturbed one does, bit for bit; return the work lost.

        Returns:
            Iterations that had to be done again.
        """
        before, had = self.rows(), [event for event in read_events(self.folder) if event["kind"] == "resumed"]
        ending = self.run()
        assert ending.codes == [0] * self.ranks, "\n".join(ending.errors)
        assert not ending.left
        assert_same_run(self.folder, straight)
        resumed = [event for event in read_events(self.folder) if event["kind"] == "resumed"][len(had) :]
        return before - (resumed[0]["iteration"] if resumed else 0)

    def newest(self) -> Path:
        """Return the newest checkpoint."""
        return candidates(self.folder / "checkpoints")[0]


@dataclass
class Started:
    """A job under way.

    Attributes:
        processes: of the ranks.
        logs: files of their output, without suffix.
        place: working folder of the ranks.
    """

    processes: list[BaseProcess]
    logs: list[Path]
    place: Path

    def wait(self, *, stopped: Sequence[int] = (), since: float | None = None) -> Ending:
        """Wait until all ranks have ended; once one has failed the others have ``SECONDS_TO_END``.

        Args:
            stopped: ranks that cannot end, and are killed when the others have, as a launcher does.
            since: when the fault struck, by ``time.monotonic()``, where no plant notes it.
        """
        deadline, failed = time.monotonic() + SECONDS_TO_FINISH, False
        awaited = [process for rank, process in enumerate(self.processes) if rank not in stopped]
        while any(process.is_alive() for process in awaited):
            if not failed and any(process.exitcode for process in self.processes):
                deadline, failed = time.monotonic() + SECONDS_TO_END, True
                since = time.monotonic() if since is None else since
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        ended = time.monotonic()
        struck = [
            float(log.with_suffix(".struck").read_text()) for log in self.logs if log.with_suffix(".struck").exists()
        ]
        seconds = ended - min([ended if since is None else since, *struck])
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in alive:
            with suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid or 0, signal.SIGKILL)
        for process in self.processes:
            process.join()
        hung = [rank for rank in alive if rank not in stopped]
        codes = [process.exitcode if process.exitcode is not None else 1 for process in self.processes]
        errors = [log.with_suffix(".err").read_text(errors="replace") for log in self.logs]
        return Ending(codes, errors, hung, seconds, self._left())

    def _left(self) -> list[int]:
        """Kill what is left of the job after two seconds; return its process IDs."""
        deadline = time.monotonic() + 2.0
        while left := [each for each in psutil.process_iter(["cwd", "status"]) if self._is_ours(each)]:
            if time.monotonic() > deadline:
                for each in left:
                    each.kill()
                return [each.pid for each in left]
            time.sleep(0.05)
        return []

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.info["cwd"] == str(self.place) and process.info["status"] != psutil.STATUS_ZOMBIE


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def assert_told(ending: Ending, *struck: int) -> None:
    """See that no rank hung, that each but those that were struck said in one line why it ended, and nothing is left.

    Args:
        ending: of the job.
        struck: ranks that the fault itself ended.
    """
    assert not ending.hung, f"ranks {ending.hung} hung: {json.dumps(ending.errors)[-2000:]}"
    assert ending.seconds <= SECONDS_TO_END, f"the last rank ended {ending.seconds:.0f} s after the fault"
    assert not ending.left, f"processes {ending.left} have outlived their ranks"
    for rank, (code, text) in enumerate(zip(ending.codes, ending.errors, strict=True)):
        if rank not in struck:
            assert code in ENDS_WELL, f"rank {rank} left with {code}: {text[-3000:]}"
            assert "Traceback" not in text, text[-3000:]
            # Rank 0 alone prints what all ranks refuse.
            told = "error: " in text or (code == EXIT_USAGE and "error: " in ending.errors[0])
            assert told or code in (0, EXIT_STOPPED), (
                f"rank {rank} left with {code} and without a message: {text[-3000:]}"
            )
