"""What is looked at before training: everything on disk, most of it before any process group exists."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hyperp import checksums, device, libraries
from megatron_hyperp.config import Config
from megatron_hyperp.data import settings
from megatron_hyperp.data.content import check_content
from megatron_hyperp.data.datasets import parse_blend
from megatron_hyperp.data.indexed import check_prefix, check_vocabulary, first_token
from megatron_hyperp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.orthogonalize import check_backend
from megatron_hyperp.training import alarms, checkpointing, determinism, profiling
from megatron_hyperp.training.compatibility import check_compatible

# Bytes of a corpus' file that every start reads in full; of a larger one tools/check_data.py does.
CORPUS_READ_IN_FULL = 256_000_000


def check(config: Config, world_size: int) -> tuple[Config, Any, Path | None]:
    """Resolve the config and look at everything on disk, before any process group exists.

    Returns:
        The resolved config, the tokenizer, and the checkpoint to resume from.

    Raises:
        UsageError: anything that cannot run.
    """
    device.check_ranks()
    if not config.data.data_path:
        raise UsageError(
            "no data; give --data-path PREFIX (tools/preprocess_data.py makes one)", same_on_all_ranks=True
        )
    if not config.data.tokenizer_model:
        raise UsageError("no tokenizer; give the --tokenizer-model the data was made with", same_on_all_ranks=True)
    tokenizer = load_tokenizer(config.data.tokenizer_model)
    config = config.resolve(world_size=world_size, tokenizer_vocab_size=tokenizer.vocab_size)
    if config.training.deterministic_mode:
        determinism.begin()
    parallel = config.parallel
    if not device.has_cuda() and parallel.expert_model_parallel_size > 1 and parallel.expert_tensor_parallel_size > 1:
        raise UsageError(
            "on CPU, gloo cannot gather the unequal numbers of tokens that --expert-model-parallel-size and"
            " --expert-tensor-parallel-size above 1 make together; set one of them to 1",
            same_on_all_ranks=True,
        )
    _check_layers(config)
    _check_kernels(config)
    check_reports(config, world_size)
    options = config.optimizer
    dtype = device.newton_schulz_dtype(options.ns_dtype, gram=options.asks_for_gram)
    try:
        check_backend(options.ns_backend, dtype)
    except UsageError as error:
        raise UsageError(f"--ns-backend {options.ns_backend}: {error}") from error
    _take_corpus_settings(config, tokenizer)
    for _, prefix in parse_blend(config.data.data_path):
        check_prefix(prefix)
        check_content(prefix, most_bytes=CORPUS_READ_IN_FULL)
        check_vocabulary(prefix, config.model.vocab_size, full_scan_bytes=CORPUS_READ_IN_FULL)
    checkpointing.check_writable(config.logging.run_dir, "--run-dir")
    if config.logging.tensorboard_dir:
        checkpointing.check_writable(config.logging.tensorboard_dir, "--tensorboard-dir")
    if config.checkpoint.save:
        checkpointing.check_writable(config.checkpoint.save, "--save")
    elif config.checkpoint.async_save:
        raise UsageError(
            "--async-save has nothing to write without --save; give a folder for checkpoints, or leave it out",
            same_on_all_ranks=True,
        )
    return config, tokenizer, _checkpoint_to_load(config)


def _take_corpus_settings(config: Config, tokenizer: Tokenizer) -> None:
    """Set in the config how the documents of its corpora begin, which exports, evaluation and generation follow."""
    prefixes = [prefix for _, prefix in parse_blend(config.data.data_path)]
    config.data.prepend_bos = settings.blend_prepends_bos(prefixes, asked=config.data.prepend_bos)
    start = tokenizer.document_start(prepend_bos=config.data.prepend_bos)
    for prefix in prefixes:
        if start and (token := first_token(prefix)) not in start:
            raise UsageError(
                f"the first document of {prefix} begins with token {token}, not with the beginning-of-sequence token"
                f" {start[0]} of --tokenizer-model; give the tokenizer it was preprocessed with, or leave out"
                " --prepend-bos"
            )


def check_reports(config: Config, world_size: int) -> None:
    """See that a resolved config's alarms and profile can be what they are to be.

    Raises:
        UsageError: one cannot.
    """
    alarms.check(config.logging.alarm, saves=config.checkpoint.save is not None)
    profiling.check(config, world_size)


def _check_layers(config: Config) -> None:
    """See that the layers asked for can run here, in the precision asked for.

    Megatron-Core itself would train without FP8 where it cannot run, and say nothing. What one node with GPUs lacks,
    another may have: there each rank says so itself.
    """
    training = config.training
    libraries.implementation(config)
    if training.fp8_format != "none" and not training.fp8_emulation:
        lacking = libraries.lacks_fp8(training.fp8_recipe)
        if lacking:
            raise UsageError(
                f"--fp8-format {training.fp8_format} with --fp8-recipe {training.fp8_recipe} needs {lacking}; give"
                " --fp8-emulation for the same numerics in emulation, or leave it out",
                same_on_all_ranks=not device.has_cuda(),
            )


# Largest head of torch's flash attention under CUDA.
FLASH_HEAD = 256


def _check_kernels(config: Config) -> None:
    training, head = config.training, config.model.kv_channels
    if device.has_cuda() and training.bf16 and head > FLASH_HEAD and libraries.attention(config) == "sdpa":
        raise UsageError(
            f"--attention-backend sdpa has heads of {FLASH_HEAD} at most under CUDA, not of {head}; lower"
            " --kv-channels, or give local",
            same_on_all_ranks=True,
        )
    if training.cross_entropy_loss_fusion:
        engine = training.cross_entropy_fusion_impl == "te"
        lacking = libraries.lacks(libraries.CROSS_ENTROPY) if engine else None if device.has_cuda() else "CUDA"
        if lacking:
            ways = "install TransformerEngine, give native, or leave it out" if engine else "leave it out"
            raise UsageError(
                f"--cross-entropy-loss-fusion with --cross-entropy-fusion-impl {training.cross_entropy_fusion_impl}"
                f" needs {lacking}; {ways}",
                same_on_all_ranks=not device.has_cuda(),
            )
    if training.gradient_accumulation_fusion and (lacking := libraries.lacks(libraries.ACCUMULATION_FUSION)):
        raise UsageError(
            f"--gradient-accumulation-fusion needs {lacking}; build NVIDIA's apex from source with --cpp_ext and"
            " --cuda_ext (not PyPI's), take an NGC image, or leave it out",
            same_on_all_ranks=not device.has_cuda(),
        )


def _checkpoint_to_load(config: Config) -> Path | None:
    load, save = config.checkpoint.load, config.checkpoint.save
    folders: list[Path] = []
    if load is not None:
        folders = checkpointing.candidates(load)
        if not folders and (save is None or Path(load).resolve() != Path(save).resolve()):
            raise UsageError(f"--load {load} holds no checkpoint; give a folder that does, or leave it out")
    if save is not None:
        checkpointing.check_save_folder(save, folders[0] if folders else None)
    folder = first_sound(folders, checkpointing.fault)
    if folder is not None:
        common = checkpointing.common_state(folder)
        check_compatible(folder, config, weights_only=common.get(checkpointing.WEIGHTS_ONLY, False))
    if config.optimizer.radius == "from-weights" and (folder is None or not common.get(checkpointing.RADII)):
        raise UsageError(
            "--radius from-weights needs --load of a checkpoint that has radii; import one with"
            " tools/convert_checkpoint.py --radius from-weights"
        )
    return folder


def first_sound(folders: Sequence[Path], fault: Callable[[Path], str | None]) -> Path | None:
    """Return the first checkpoint that has no fault, and say which were passed over; None if there are none at all.

    Args:
        folders: in the order in which they are tried.
        fault: says what is wrong with one.

    Raises:
        UsageError: all have faults; the first one's is told.
    """
    reasons: list[str] = []
    for folder in folders:
        reason = fault(folder)
        if reason is None:
            for other, told in zip(folders, reasons, strict=False):
                _say(f"note: the checkpoint {other} is damaged ({told}); going back to {folder.name}")
            return folder
        reasons.append(reason)
    if not reasons:
        return None
    raise UsageError(
        f"the checkpoint {folders[0]} cannot be read ({reasons[0]}), and there is no sound one before it; name another"
        " with --load, or start anew with another --save",
        same_on_all_ranks=True,
    )


def verify(config: Config, found: Path | None) -> Path | None:
    """Read all files of the checkpoint that was found, each rank its share, and go back to an older one if need be.

    A collective call.

    Raises:
        UsageError: there is no sound one.
    """
    if found is None:
        return None
    assert config.checkpoint.load is not None
    folders = checkpointing.candidates(config.checkpoint.load)
    folder = first_sound(folders[folders.index(found) :], _fault_of_shares)
    if folder is not None and folder != found:
        common = checkpointing.common_state(folder)
        check_compatible(folder, config, weights_only=common.get(checkpointing.WEIGHTS_ONLY, False))
    return folder


def _fault_of_shares(folder: Path) -> str | None:
    """Compare checksums, files dealt out over all ranks; a collective call."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: list[str | None] = [None] * ranks
    try:
        names = sorted(checksums.read(folder) or {})
        mine = next(iter(checksums.faults(folder, names[rank::ranks])), None)
    except (OSError, ValueError) as error:
        mine = str(error)
    dist.all_gather_object(found, mine)
    return next((each for each in found if each), None)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
