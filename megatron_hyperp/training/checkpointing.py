"""Checkpoints: one folder per iteration in Megatron-Core's torch_dist format, loadable under any layout.

A checkpoint is written into a folder of another name, renamed when it is complete, and only then named in the tracker
file, so that a killed save never becomes the latest. Its ``config.yaml`` is the run's resolved config.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_hyperp import __version__, arguments
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.processes import die_with_parent
from megatron_hyperp.training.logging import CONFIG_FILE
from megatron_hyperp.training.signals import SIGNALS

TRACKER = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        iteration: optimizer steps done, skipped ones included.
        consumed_samples: training sequences drawn from the dataset.
        consumed_tokens: tokens in them.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


def checkpoint_folder(root: str | Path, iteration: int) -> Path:
    """Return the folder of one iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def find_checkpoint(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint under ``root`` (or ``root`` itself if it is one), or None if there is none.

    Raises:
        UsageError: the tracker file names a checkpoint that is not there.
    """
    root = Path(root)
    if _is_complete(root):
        return root
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    content = tracker.read_text(errors="replace").strip()
    folder = checkpoint_folder(root, int(content)) if re.fullmatch(r"[0-9]{1,12}", content) else None
    if folder is None or not _is_complete(folder):
        found = ", ".join(path.name for path in _complete_checkpoints(root)) or "none"
        raise UsageError(
            f"{tracker} names iteration {content[:20]!r}, which is not a checkpoint in {root}; complete ones there:"
            f" {found}; name one with --load {root}/iter_..."
        )
    return folder


def check_save_folder(root: str | Path, resume_from: Path | None) -> None:
    """Refuse to mix this run's checkpoints with those of another, or with later ones that it has not loaded.

    Raises:
        UsageError: ``root`` holds checkpoints and its newest is not the one that the run resumes from.
    """
    newest = find_checkpoint(root)
    if newest is None or (resume_from is not None and newest.resolve() == resume_from.resolve()):
        return
    raise UsageError(
        f"--save {root} already holds checkpoints up to {newest.name}, which this run would mix with its own;"
        f" resume from the newest with --load {root}, or give --save an empty folder",
        same_on_all_ranks=True,
    )


def check_writable(folder: str | Path, flag: str) -> None:
    """Create ``folder`` if need be and try a file in it.

    Raises:
        UsageError: it cannot be created or written; the message has the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written ({error.strerror}); give a folder that can") from error


def save_checkpoint(
    config: Config,
    progress: Progress,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    balance: Any = None,
    scales: Any = None,
    run_id: str | None = None,
) -> Path:
    """Write a checkpoint, make it the latest, drop those beyond ``--keep``; a collective call.

    Args:
        config: resolved config with ``checkpoint.save`` set.
        progress: where the run stands.
        chunks: this rank's pipeline chunks.
        optimizer: the Megatron optimizer.
        balance: loads of a mixture of experts; None for a dense model.
        scales: of delayed scaling in emulated FP8, if there are any.
        run_id: of the Weights & Biases run, so that a resumed run continues it.

    Returns:
        The checkpoint's folder.
    """
    from megatron.core import dist_checkpointing

    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    folder = checkpoint_folder(root, progress.iteration)
    partial = folder.with_name(f"partial_{folder.name}")
    if dist.get_rank() == 0:
        for leftover in root.glob("partial_*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _write_durably(partial / CONFIG_FILE, _config_text(config))
    dist.barrier()
    history = keeps_fp8_history(config)
    state = _sharded_state(chunks, optimizer, with_random_state=True, with_fp8_state=history)
    state |= {
        "fp8_history": history,
        "progress": dataclasses.asdict(progress),
        "layout": _layout(),
        "version": __version__,
        "run_id": run_id,
        "balance": None if balance is None else balance.state(),
        "fp8": None if scales is None else scales.state(),
    }
    _start_manager()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        if folder.exists():
            os.replace(folder, folder.with_name(f"partial_old_{folder.name}"))
        os.replace(partial, folder)
        _write_durably(root / TRACKER, f"{progress.iteration}\n")
        _drop_old(root, config.checkpoint.keep, progress.iteration)
    dist.barrier()
    return folder


@functools.cache
def _start_manager() -> None:
    """Start the process through which Megatron-Core's writers report, in place of its own.

    A signal to all processes of a job, as Slurm sends it, would end that one before the checkpoint that it asks for;
    and the death of its rank would not, so that it kept the rank's output open.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_serve_quietly, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


def _serve_quietly(parent: int) -> None:
    die_with_parent(parent)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def load_checkpoint(
    config: Config,
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    balance: Any = None,
    scales: Any = None,
) -> tuple[Progress, str | None]:
    """Restore model, optimizer, expert loads, scales of FP8 and random state; a collective call.

    The random state is restored only under the layout that wrote it; without dropout nothing depends on it. So is
    TransformerEngine's history of FP8 scales, which otherwise begins anew.

    Returns:
        Where the run stands, and the Weights & Biases run id.

    Raises:
        UsageError: the checkpoint cannot be read.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    # Torch logs the traceback of what it then raises, which is told below in one line.
    logging.disable(logging.WARNING)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        same_layout = common.get("layout") == _layout()
        history = same_layout and common.get("fp8_history", False) and keeps_fp8_history(config)
        state = _sharded_state(chunks, optimizer, with_random_state=same_layout, with_fp8_state=history)
        loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        # Torch's exception is no Exception, and holds the reasons by rank.
        reasons = [failure[0] for failure in getattr(error, "failures", {}).values()]
        reason = reasons[0] if reasons else error
        raise UsageError(
            f"the checkpoint {folder} cannot be read ({type(reason).__name__}: {_first_line(reason)}), unless another"
            " rank failed first; name an older one with --load"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    for index, chunk in enumerate(chunks):
        missing, unexpected = _model(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected
        assert all(map(_is_extra_state, missing))
    optimizer.load_state_dict(loaded["optimizer"])
    if balance is not None:
        balance.load(loaded["balance"])
    # None there if the run went without delayed scaling until now.
    if scales is not None and loaded.get("fp8") is not None:
        scales.load(loaded["fp8"])
    if same_layout:
        _restore_random_state(loaded["rng"][0])
    return Progress(**loaded["progress"]), loaded["run_id"]


def keeps_fp8_history(config: Config) -> bool:
    """Whether layers have an FP8 state of their own: TransformerEngine's, with delayed scales."""
    training = config.training
    return training.fp8_format != "none" and training.fp8_recipe == "delayed" and not training.fp8_emulation


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0][:200]


def _model(chunk: torch.nn.Module) -> Any:
    """Return the GPTModel inside its wrappers."""
    module: Any = chunk
    while hasattr(module, "module"):
        module = module.module
    return module


def _is_extra_state(name: str) -> bool:
    """Whether a name in a module's state is that of TransformerEngine's FP8 state."""
    return bool(re.search(r"\._extra_state\d*$", name))


def _sharded_model(chunk: torch.nn.Module, *, with_fp8_state: bool) -> dict[str, Any]:
    """Describe a chunk's weights; layers' FP8 state only where asked for, since other layers have none to load."""
    state = _model(chunk).sharded_state_dict()
    return {name: entry for name, entry in state.items() if with_fp8_state or not _is_extra_state(name)}


def _sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any, *, with_random_state: bool, with_fp8_state: bool
) -> dict[str, Any]:
    models = {
        f"model{index}": _sharded_model(chunk, with_fp8_state=with_fp8_state) for index, chunk in enumerate(chunks)
    }
    state: dict[str, Any] = {**models, "optimizer": optimizer.sharded_state_dict(models)}
    if with_random_state:
        state["rng"] = _random_state()
    return state


def _random_state() -> Any:
    """Return this rank's random states as one sharded object."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = state
    content = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng_state", [content], tuple(_layout()[:3]), ranks)


def _restore_random_state(content: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(content["python"])
    name, keys, position, has_gauss, gauss = content["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(content["torch"])
    torch.cuda.set_rng_state(content["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(content["tracker"])


def _layout() -> list[int]:
    """Return the sizes of pipeline, tensor and data parallelism, and the pipeline chunks per rank."""
    from megatron.core import parallel_state

    return [
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    ]


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_FILE, "metadata.json", ".metadata", "common.pt"))


def _complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints under ``root``, oldest iteration first."""
    folders = [path for path in root.glob("iter_*") if re.fullmatch(r"iter_[0-9]+", path.name) and _is_complete(path)]
    return sorted(folders, key=_iteration)


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _drop_old(root: Path, keep: int, latest: int) -> None:
    """Delete what was replaced, and all but the newest ``keep`` checkpoints up to the latest."""
    for leftover in root.glob("partial_*"):
        shutil.rmtree(leftover)
    if keep:
        for folder in [path for path in _complete_checkpoints(root) if _iteration(path) <= latest][:-keep]:
            shutil.rmtree(folder)


def write_run_config(config: Config) -> None:
    """Write the resolved config into the run folder."""
    _write_durably(Path(config.logging.run_dir) / CONFIG_FILE, _config_text(config))


def _config_text(config: Config) -> str:
    note = "# As resolved: sizes, multipliers and schedule are explicit and no longer follow from depth or optimizer.\n"
    return note + arguments.to_yaml(config)
