"""Writing checkpoints: while training waits, or by a process beside it (``--async-save``).

A checkpoint is written into a folder of another name, renamed when it is complete, and only then named in the tracker
file, so that a killed save never becomes the latest. Its ``config.yaml`` is the run's resolved config.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp import __version__, checksums
from megatron_hyperp.config import Config
from megatron_hyperp.data.batches import is_lost_process
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import flush, write_atomically
from megatron_hyperp.megatron_compat.async_saving import save_queue, start_reports
from megatron_hyperp.megatron_compat.checkpoints import begin_save, missing_data
from megatron_hyperp.processes import bound_children
from megatron_hyperp.training.checkpoint_folders import (
    TRACKER,
    checkpoint_folder,
    complete_checkpoints,
    fault,
    iteration_of,
)
from megatron_hyperp.training.checkpointing import (
    PARENT,
    RADII,
    RUN_ID,
    Progress,
    config_text,
    first_failure,
    first_line,
    keeps_fp8_history,
    layout,
    sharded_state,
)
from megatron_hyperp.training.heartbeats import explain
from megatron_hyperp.training.logging import CONFIG_FILE
from megatron_hyperp.training.schedule import SCHEDULE, Schedule
from megatron_hyperp.training.signals import SIGNALS


@dataclasses.dataclass(slots=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        folder: where it is.
        iteration: of the run, when it was taken.
        seconds: from its beginning to its end.
        waited: of these, seconds in which nothing was trained.
    """

    folder: Path
    iteration: int
    seconds: float
    waited: float


class Saver:
    """Writes the checkpoints of a run. All calls are collective.

    With ``--async-save`` a save copies what is on a CUDA device to the host, forks a process that writes it (on CPU the
    fork itself is the copy), and goes on; :meth:`poll` after each step sees whether all ranks are done. The next save
    waits for the one before.

    Args:
        config: resolved config with ``checkpoint.save`` set.
        chunks: this rank's pipeline chunks.
        optimizer: the Megatron optimizer.
        balance: loads of a mixture of experts; None for a dense model.
        scales: of delayed scaling in emulated FP8, if there are any.
        radii: of spheres that do not follow from shapes, by the parameter's name.
        parent: where a branch comes from (lineage.py).
        schedule: of the run.
        said: called on every rank for each checkpoint that is complete.
    """

    def __init__(
        self,
        config: Config,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        balance: Any = None,
        scales: Any = None,
        *,
        radii: dict[str, float] | None = None,
        parent: dict[str, Any] | None = None,
        schedule: Schedule,
        said: Callable[[Saved], None],
    ) -> None:
        assert config.checkpoint.save is not None
        self._config, self._said = config, said
        self._chunks, self._optimizer, self._balance, self._scales = chunks, optimizer, balance, scales
        self._radii, self._parent, self._schedule = radii, parent, schedule
        self._root = Path(config.checkpoint.save)
        self._queue = save_queue()

    def save(self, progress: Progress, *, run_id: str | None = None, keep_all: bool = False) -> None:
        """Write a checkpoint, make it the latest, drop those beyond ``--keep``; with ``--async-save``, begin to.

        Args:
            progress: where the run stands.
            run_id: of the Weights & Biases run, so that a resumed run continues it.
            keep_all: drop no older checkpoint, whatever ``--keep`` says.

        Raises:
            UsageError: a weight or a state of the optimizer is not finite, or the checkpoint cannot be written.
        """
        self.finish()
        state = self._state(progress, run_id)
        _check_finite(state, progress.iteration)
        saved = Saved(checkpoint_folder(self._root, progress.iteration), progress.iteration, -time.monotonic(), 0.0)
        with self._failures_told(), bound_children():
            partial = _prepare(saved.folder, self._config)
            start_reports(SIGNALS)
            request = begin_save(state, partial)
            request.add_finalize_fn(functools.partial(self._complete, partial, saved, keep_all))
            if self._config.checkpoint.async_save:
                self._queue.schedule_async_request(request)
                saved.waited = saved.seconds + time.monotonic()
            else:
                request.execute_sync()

    def _state(self, progress: Progress, run_id: str | None) -> dict[str, Any]:
        history = keeps_fp8_history(self._config)
        state = sharded_state(self._chunks, self._optimizer, with_random_state=True, with_fp8_state=history)
        return state | {
            "fp8_history": history,
            "progress": dataclasses.asdict(progress),
            SCHEDULE: self._schedule.state(),
            "layout": layout(),
            "version": __version__,
            RUN_ID: run_id,
            PARENT: self._parent,
            RADII: self._radii,
            "balance": None if self._balance is None else self._balance.state(),
            "fp8": None if self._scales is None else self._scales.state(),
        }

    def poll(self) -> None:
        """Complete the save that is under way, if all ranks have written their parts."""
        if self._queue.get_num_unfinalized_calls():
            with self._failures_told():
                self._queue.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one."""
        with self._failures_told():
            self._queue.maybe_finalize_async_calls(blocking=True)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Say in one line why a checkpoint could not be written; the loss of a process is reported elsewhere."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield
        # Torch's is no Exception; all ranks get it alike, with the reasons by rank.
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_lost_process(error) or (isinstance(error, RuntimeError) and explain(error, "")):
                raise
            reason = first_failure(error)
            told = getattr(reason, "strerror", None) or first_line(reason)
            with suppress(OSError):
                told += f"; {shutil.disk_usage(self._root).free:,} bytes are free there"
            raise UsageError(
                f"the checkpoint in {self._root} cannot be written ({told}); those saved before are whole: make room"
                " or mend the disk, and start again",
                same_on_all_ranks=isinstance(error, CheckpointException),
            ) from error

    def _complete(self, partial: Path, saved: Saved, keep_all: bool) -> None:
        """Make what has been written the latest checkpoint."""
        sums = _checksums(partial)
        if dist.get_rank() == 0:
            checksums.write(partial, sums)
        _read_back(partial)
        if dist.get_rank() == 0:
            if saved.folder.exists():
                os.replace(saved.folder, saved.folder.with_name(f"partial_old_{saved.folder.name}"))
            os.replace(partial, saved.folder)
            # Nor does a loss of power leave a tracker that names nothing, or drop what this replaces.
            flush(self._root)
            write_atomically(self._root / TRACKER, f"{saved.iteration}\n", durable=True)
            drop_old(self._root, 0 if keep_all else self._config.checkpoint.keep, saved.iteration)
        dist.barrier()
        saved.seconds += time.monotonic()
        self._said(saved)


def _check_finite(state: dict[str, Any], iteration: int) -> None:
    """See that what would be saved is finite on all ranks: such a checkpoint would in time replace the sound ones.

    Raises:
        UsageError: it is not.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    # Several shards of a rank may have one name.
    held = ((getattr(entry, "key", ""), getattr(entry, "data", None)) for entry in nested_values(state))
    tensors = ((key, data) for key, data in held if isinstance(data, torch.Tensor) and data.is_floating_point())
    mine = next((key for key, data in tensors if not bool(torch.isfinite(data).all())), None)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    rank = next((rank for rank, name in enumerate(found) if name), None)
    if rank is not None:
        raise UsageError(
            f"{found[rank]} of rank {rank} is not finite after iteration {iteration}, so nothing is saved; go on from"
            " the last checkpoint, with a lower --lr or other data if it comes again",
            same_on_all_ranks=True,
        )


def _prepare(folder: Path, config: Config) -> Path:
    """Make the folder that is written into, with the run's config; return it."""
    partial = folder.with_name(f"partial_{folder.name}")
    if dist.get_rank() == 0:
        for leftover in folder.parent.glob("partial_*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write_atomically(partial / CONFIG_FILE, config_text(config), durable=True)
    dist.barrier()
    return partial


def _checksums(folder: Path) -> dict[str, checksums.Checksum]:
    """Take the checksums of all files, on the disk by then; each rank reads those that it has written; collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = {path.name: checksums.checksum(path) for path in folder.glob(f"__{rank}_*.distcp")}
    if rank == 0:
        others = [path for path in folder.iterdir() if not path.name.endswith(".distcp")]
        # Megatron-Core flushes the parts, and the names in the folder are flushed with the checksums.
        for path in others:
            flush(path)
        own |= {path.name: checksums.checksum(path) for path in others}
    parts: list[dict[str, checksums.Checksum]] = [{}] * ranks
    dist.all_gather_object(parts, own)
    return {name: each for part in parts for name, each in part.items()}


def _read_back(folder: Path) -> None:
    """Check that what has been written is a complete checkpoint; a collective call.

    Raises:
        UsageError: it is not, or cannot be read; on all ranks.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            problem = [fault(folder) or missing_data(folder)]
        except Exception as error:  # a damaged file fails in any way; the other ranks wait for the answer
            problem = [first_line(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UsageError(
            f"the checkpoint just written in {folder} is not complete ({problem[0]}), and is not used; those saved"
            " before are whole: check the disk, and resume from the newest of them",
            same_on_all_ranks=True,
        )


def drop_old(root: Path, keep: int, latest: int) -> None:
    """Delete what was replaced, and all but the newest ``keep`` checkpoints up to the latest."""
    for leftover in root.glob("partial_*"):
        shutil.rmtree(leftover)
    if keep:
        for folder in [path for path in complete_checkpoints(root) if iteration_of(path) <= latest][:-keep]:
            shutil.rmtree(folder)
