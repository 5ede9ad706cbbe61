"""One job at a time writes a run folder or a folder of checkpoints.

Rank 0 keeps ``run.lock`` in the folder, which says who it is, locked by the kernel (released at its death, however it
dies) and touched every few seconds. On one node the kernel's lock decides alone. Between nodes it does not: some file
systems keep it from others, and some keep it for a node that is dead. There the sign of life decides: a lock is taken
over when it has been silent for long, and who finds on waking that its lock is another's ends at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil
import torch.distributed as dist

from megatron_hyperp.config import Config
from megatron_hyperp.errors import EXIT_USAGE, UsageError, leave_at_once

FILE = "run.lock"
# Seconds between signs of life, and after how many such times without one a job on another node is taken for dead.
BEAT = 5.0
MOST_MISSED = 6
# Of two jobs that take over the same lock, where locks do not reach over nodes, the last one to write keeps it.
SECONDS_TO_SETTLE = 1.0
# A process that is dead already keeps its locks until the last of its threads has gone.
SECONDS_TO_DIE = 5.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: name of the node.
        boot: identity of the node's running kernel; two nodes may have one name.
        pid: of the process.
        started: when the process began, seconds since 1970: process IDs are used again.
        since: when it took the lock, in words.
        job: of Slurm, if any.
        beat: seconds between its signs of life.
    """

    host: str
    boot: str
    pid: int
    started: float
    since: str
    job: str | None
    beat: float

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        started, job = psutil.Process().create_time(), os.environ.get("SLURM_JOB_ID")
        return cls(socket.gethostname(), _boot(), os.getpid(), started, now, job, BEAT)

    @classmethod
    def read(cls, content: bytes) -> Owner | None:
        """The owner that a lock names; None if it can't be read."""
        with contextlib.suppress(ValueError, TypeError):
            found = cls(**json.loads(content))
            if isinstance(found.pid, int) and float(found.beat) > 0 and float(found.started) >= 0:
                return found
        return None

    @property
    def is_near(self) -> bool:
        """Whether it runs, or ran, under this node's kernel."""
        return self.boot == _boot()

    @property
    def lives(self) -> bool:
        """Whether its process is there still; ask on its own node."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            # The kernel's clock, from which this is counted, is set now and then.
            return abs(process.create_time() - self.started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
        return False

    def describe(self) -> str:
        """Who, for a message."""
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


class RunLock:
    """Holds a folder until :meth:`release`; a constructor that returns has it.

    Args:
        folder: it must be there.
        flag: that names it, for messages.

    Raises:
        UsageError: another job has it, or no file can be made there.
    """

    def __init__(self, folder: str | Path, flag: str) -> None:
        self._path, self._what = Path(folder) / FILE, f"{flag} {folder}"
        self._patient_until = time.monotonic() + SECONDS_TO_DIE
        temporary = self._path.with_name(f"{FILE}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            with ExitStack() as undo:
                self._stream = undo.enter_context(temporary.open("w+b", buffering=0))
                undo.callback(temporary.unlink, missing_ok=True)
                self._stream.write(json.dumps(asdict(Owner.this())).encode())
                _lock(self._stream)
                self._take(temporary)
                temporary.unlink(missing_ok=True)
                undo.pop_all()
        except OSError as error:
            raise UsageError(f"{self._what} cannot be locked ({error.strerror}); give another folder") from error
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _take(self, temporary: Path) -> None:
        """Give the new lock its name, once no one has another."""
        while not self._is_first(temporary):
            seen = self._wait_for_silence()
            if seen is not None and self._replace(temporary, seen):
                return

    def _is_first(self, temporary: Path) -> bool:
        """Take the name if nothing has it."""
        try:
            # Unlike a rename, a link fails where there is a file already.
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            # Some file systems have no links.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if self._path.exists():
                return False
            os.replace(temporary, self._path)
        return True

    def _wait_for_silence(self) -> bytes | None:
        """Return the lock in the way once nothing speaks for its owner, as far as signs of life tell; None: it is gone.

        Raises:
            UsageError: the owner is on another node and gave a sign of life.
        """
        first: float | None = None
        while True:
            try:
                # Opened each time: that makes a client of NFS ask the server.
                with self._path.open("rb") as stream:
                    content, touched = stream.read(), os.fstat(stream.fileno()).st_mtime
            except FileNotFoundError:
                return None
            owner = Owner.read(content)
            if owner is None or owner.is_near:
                return content
            silent, enough = self._now() - touched, MOST_MISSED * owner.beat
            if silent > enough:
                _note(f"{self._what} was held by {owner.describe()}, silent for {silent:.0f} s; taken over")
                return content
            if first is None:
                first = touched
                _note(f"{self._what} is held by {owner.describe()}; waiting up to {enough:.0f} s for a sign of life")
            if touched > first:
                raise self._refusal(owner)
            time.sleep(min(1.0, owner.beat / 4))

    def _now(self) -> float:
        """The time by the file system's clock, for clocks of nodes differ."""
        os.utime(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_mtime

    def _replace(self, temporary: Path, seen: bytes) -> bool:
        """Put the new lock in place of one that is left over; return whether that was still there.

        Raises:
            UsageError: its owner is alive.
        """
        try:
            with self._path.open("r+b") as old:
                # Held until the new one is in place: of several that find it left over, one replaces it.
                free, owner = _lock(old), Owner.read(seen)
                if old.read() != seen or not _is_at(old, self._path):
                    return False
                # A node that is silent is taken for dead, whatever its file server says.
                if owner is None or owner.is_near:
                    lives = owner is not None and owner.lives
                    if free is False and not lives and time.monotonic() < self._patient_until:
                        time.sleep(0.1)
                        return False
                    if free is False or lives:
                        raise self._refusal(owner)
                    _note(f"{self._what} was held by {_who(owner)}, which has ended; taken over")
                os.replace(temporary, self._path)
        except FileNotFoundError:
            return False
        if owner is not None and not owner.is_near:
            time.sleep(SECONDS_TO_SETTLE)
            if not _is_at(self._stream, self._path):
                raise self._refusal(Owner.read(self._path.read_bytes()))
        return True

    def _refusal(self, owner: Owner | None) -> UsageError:
        return UsageError(
            f"{self._what} is in use by {_who(owner)}; wait until that ends, stop it, or give another folder",
            same_on_all_ranks=True,
        )

    def _work(self) -> None:
        """Give signs of life; end this process when another has the folder."""
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._path.exists() and not _is_at(self._stream, self._path):
                    who = _who(Owner.read(self._path.read_bytes()))
                    print(f"error: {self._what} was taken over by {who} while this job was silent", file=sys.stderr)
                    leave_at_once(EXIT_USAGE)
                os.utime(self._stream.fileno())

    def release(self) -> None:
        """Let others have the folder."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError), self._stream:
            if _is_at(self._stream, self._path):
                self._path.unlink()


def _lock(stream: IO[bytes]) -> bool | None:
    """Try the kernel's lock; return whether this process got it, or None where the file system has none.

    POSIX's kind: a child that outlives its parent does not keep it. It is lost when the process closes any descriptor
    of the file, so nothing else opens one that is held.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _is_at(stream: IO[bytes], path: Path) -> bool:
    """Whether an open file is what a path names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _who(owner: Owner | None) -> str:
    return owner.describe() if owner else "a process that did not give its name"


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


@contextmanager
def held(config: Config) -> Iterator[None]:
    """Hold the folders that a job writes, by its rank 0; a collective call, torch's process group must exist.

    Raises:
        UsageError: another job has one of them; on all ranks alike.
    """
    distinct: dict[Path, tuple[str, str]] = {}
    for flag, folder in (("--run-dir", config.logging.run_dir), ("--save", config.checkpoint.save)):
        if folder:
            distinct.setdefault(Path(folder).resolve(), (folder, flag))
    refusal: list[str | None] = [None]
    with ExitStack() as locks:
        if dist.get_rank() == 0:
            try:
                for folder, flag in distinct.values():
                    locks.callback(RunLock(folder, flag).release)
            except UsageError as error:
                refusal = [str(error)]
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise UsageError(refusal[0], same_on_all_ranks=True)
        yield
