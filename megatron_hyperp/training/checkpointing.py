"""Checkpoints: one folder per iteration in Megatron-Core's torch_dist format, loadable under any layout."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.convert.storage import check_format, read_common
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import write_atomically
from megatron_hyperp.megatron_compat import checkpoints
from megatron_hyperp.megatron_compat.checkpoints import METADATA_FILE
from megatron_hyperp.pickles import load_metadata
from megatron_hyperp.training.checkpoint_folders import candidates
from megatron_hyperp.training.logging import CONFIG_FILE

# Of the state that all ranks share: a checkpoint without optimizer state, with which a training begins; and the radii
# of matrices whose spheres are those of imported weights, by name.
WEIGHTS_ONLY, RADII = "weights_only", "radii"
# Also there: the Weights & Biases run, and the parent of a run that started from another one's checkpoint (lineage.py).
RUN_ID, PARENT = "run_id", "parent"


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


def own_checkpoints(config: Config) -> list[Path]:
    """Return the checkpoints that a run can resume from, as :func:`candidates` does: those in ``--load``.

    With ``--pretrained-checkpoint`` those in ``--save`` come next, so that a requeued job continues its own run.

    Raises: as :func:`candidates`.
    """
    options = config.checkpoint
    found = candidates(options.load) if options.load is not None else []
    if not found and options.pretrained_checkpoint is not None and options.save is not None:
        found = candidates(options.save)
    return found


def starting_checkpoints(config: Config) -> list[Path]:
    """Return the checkpoints that a run can start from: its own, else those in ``--pretrained-checkpoint``.

    Raises: as :func:`candidates`.
    """
    pretrained = config.checkpoint.pretrained_checkpoint
    return own_checkpoints(config) or (candidates(pretrained) if pretrained is not None else [])


def takes_weights_only(config: Config, common: dict[str, Any]) -> bool:
    """Whether a run starts at iteration 0 with the weights of the checkpoint that it found, and nothing else of it.

    Args:
        config: of the run, none of whose checkpoints has been written since it looked for one.
        common: values that all ranks share in the checkpoint.
    """
    pretrained = config.checkpoint.pretrained_checkpoint is not None and not own_checkpoints(config)
    return pretrained or bool(common.get(WEIGHTS_ONLY, False))


def common_state(folder: Path) -> dict[str, Any]:
    """Return what all ranks share in a checkpoint: plain values.

    Raises:
        UsageError: it cannot be read, is of another format, or its pickles hold code objects.
    """
    try:
        check_format(folder)
        # Megatron-Core reads this again, and would run what it names.
        load_metadata(folder / METADATA_FILE)
        common = read_common(folder)
    except UsageError as error:
        raise UsageError(
            f"the checkpoint {folder} cannot be read ({error}); name an older one with --load", same_on_all_ranks=True
        ) from error
    return common


def check_save_folder(root: str | Path, resume_from: Path | None) -> None:
    """Refuse to mix this run's checkpoints with those of another, or with later ones that it has not loaded.

    Raises:
        UsageError: ``root`` holds checkpoints and its newest is not the one that the run resumes from.
    """
    newest = next(iter(candidates(root)), None)
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


def load_checkpoint(
    config: Config,
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    balance: Any = None,
    scales: Any = None,
    *,
    weights_only: bool = False,
) -> Progress:
    """Restore model, optimizer, expert loads, scales of FP8 and random state; a collective call.

    With ``weights_only`` the weights become the optimizer's masters too, and the run stands at its beginning.
    The random state is restored only under the layout that wrote it; without dropout nothing depends on it. So is
    TransformerEngine's history of FP8 scales, which otherwise begins anew.

    Returns:
        Where the run stands.

    Raises:
        UsageError: the checkpoint cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_hyperp.optim.distributed import COUNTS_IDLE_STEPS, without_idle_steps

    common = common_state(folder)
    # Torch logs the traceback of what it then raises, which is told below in one line.
    logging.disable(logging.WARNING)
    try:
        same_layout = common.get("layout") == layout()
        history = not weights_only and same_layout and common.get("fp8_history", False) and keeps_fp8_history(config)
        if weights_only:
            # Their first gathering would write over what is loaded.
            optimizer.exchange.finish_param_sync()
            state = _sharded_models(chunks, with_fp8_state=False)
        else:
            state = sharded_state(chunks, optimizer, with_random_state=same_layout, with_fp8_state=history)
            if not common.get("optimizer", {}).get(COUNTS_IDLE_STEPS):
                without_idle_steps(state["optimizer"])
        # TransformerEngine's history is pickled by itself; all else are tensors and plain values.
        with nullcontext() if history else _no_code():
            loaded = checkpoints.load(state, folder, common)
    except (Exception, CheckpointException) as error:
        reason = first_failure(error)
        raise UsageError(
            f"the checkpoint {folder} cannot be read ({type(reason).__name__}: {first_line(reason)}), unless another"
            " rank failed first; name an older one with --load"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    for index, chunk in enumerate(chunks):
        missing, unexpected = _model(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected
        assert all(map(_is_extra_state, missing))
    if weights_only:
        optimizer.reload_model_params()
        return Progress()
    optimizer.load_state_dict(loaded["optimizer"])
    if balance is not None:
        balance.load(loaded["balance"])
    # None there if the run went without delayed scaling until now.
    if scales is not None and loaded.get("fp8") is not None:
        scales.load(loaded["fp8"])
    if same_layout:
        _restore_random_state(loaded["rng"][0])
    return Progress(**loaded["progress"])


@contextmanager
def _no_code() -> Iterator[None]:
    """Have ``torch.load`` refuse code objects, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def keeps_fp8_history(config: Config) -> bool:
    """Whether layers have an FP8 state of their own: TransformerEngine's, with delayed scales."""
    training = config.training
    return training.fp8_format != "none" and training.fp8_recipe == "delayed" and not training.fp8_emulation


def first_failure(error: BaseException) -> BaseException:
    """Return what went wrong: torch's CheckpointException, which is no Exception, holds the reasons by rank."""
    reason: BaseException = next((failure[0] for failure in getattr(error, "failures", {}).values()), error)
    return reason


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, 200 characters at most."""
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


def _sharded_models(chunks: Sequence[torch.nn.Module], *, with_fp8_state: bool) -> dict[str, Any]:
    return {f"model{index}": _sharded_model(chunk, with_fp8_state=with_fp8_state) for index, chunk in enumerate(chunks)}


def sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any, *, with_random_state: bool, with_fp8_state: bool
) -> dict[str, Any]:
    """Describe weights and optimizer, under ``model0``, ... (one of each pipeline chunk) and ``optimizer``.

    Args:
        chunks: this rank's pipeline chunks.
        optimizer: the Megatron optimizer.
        with_random_state: also this rank's random states, under ``rng``.
        with_fp8_state: also the history of TransformerEngine's FP8 scales.
    """
    models = _sharded_models(chunks, with_fp8_state=with_fp8_state)
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
    return ShardedObject("rng_state", [content], tuple(layout()[:3]), ranks)


def _restore_random_state(content: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(content["python"])
    name, keys, position, has_gauss, gauss = content["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(content["torch"])
    torch.cuda.set_rng_state(content["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(content["tracker"])


def layout() -> list[int]:
    """Return the sizes of pipeline, tensor and data parallelism, and the pipeline chunks per rank."""
    from megatron.core import parallel_state

    return [
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    ]


def write_run_config(config: Config) -> None:
    """Write the resolved config into the run folder."""
    write_atomically(Path(config.logging.run_dir) / CONFIG_FILE, config_text(config), durable=True)


def config_text(config: Config) -> str:
    """Return the YAML of a resolved config, as runs and checkpoints keep it."""
    note = "# As resolved: sizes, multipliers and schedule are explicit and no longer follow from depth or optimizer.\n"
    return note + arguments.to_yaml(config)
