"""What is looked at before training: everything on disk, most of it before any process group exists."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hyperp import arguments, checksums, device, libraries
from megatron_hyperp.config import Config
from megatron_hyperp.data import settings
from megatron_hyperp.data.content import check_content
from megatron_hyperp.data.datasets import check_shares, parse_blend
from megatron_hyperp.data.indexed import check_prefix, check_vocabulary, first_token
from megatron_hyperp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.orthogonalize import check_backend
from megatron_hyperp.planning.plan import with_vocabulary
from megatron_hyperp.resolve import check_paths
from megatron_hyperp.training import (
    alarms,
    checkpoint_folders,
    checkpointing,
    determinism,
    lineage,
    profiling,
    schedule,
)
from megatron_hyperp.training.compatibility import check_compatible
from megatron_hyperp.training.logging import CONFIG_FILE
from megatron_hyperp.training.schedule import SCHEDULE, Schedule

# Bytes of a corpus' file that every start reads in full; of a larger one tools/check_data.py does.
CORPUS_READ_IN_FULL = 256_000_000


def check(config: Config, world_size: int) -> tuple[Config, Tokenizer | None, Path | None, Schedule]:
    """Resolve the config and look at everything on disk, before any process group exists.

    Returns:
        The resolved config, the tokenizer (None for ``--mock-data`` without one), the checkpoint to start from, and the
        schedule.

    Raises:
        UsageError: anything that cannot run.
    """
    device.check_ranks()
    check_paths(config)
    tokenizer, folder = _tokenizer(config), _checkpoint_to_load(config)
    config, course = planned(config, world_size, tokenizer, folder)
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
    check_reports(config, world_size, _last_iteration(config, course, folder))
    options = config.optimizer
    dtype = device.newton_schulz_dtype(options.ns_dtype, gram="gram" in (options.ns_form, options.ns_strategy))
    try:
        check_backend(options.ns_backend, dtype)
    except UsageError as error:
        raise UsageError(f"--ns-backend {options.ns_backend}: {error}") from error
    if not config.data.mock_data:
        _check_corpora(config)
        assert tokenizer is not None
        _take_corpus_settings(config, tokenizer)
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
    _check_checkpoint(config, course, folder)
    return config, tokenizer, folder, course


def _tokenizer(config: Config) -> Tokenizer | None:
    """Load the tokenizer; return None where ``--mock-data`` needs none.

    Raises:
        UsageError: there is no data, or no tokenizer.
    """
    data = config.data
    if not data.data_path and not data.mock_data:
        raise UsageError(
            "no data; give --data-path PREFIX (tools/preprocess_data.py makes one), or --mock-data for synthetic data",
            same_on_all_ranks=True,
        )
    if data.tokenizer_model:
        return load_tokenizer(data.tokenizer_model)
    if not data.mock_data:
        raise UsageError("no tokenizer; give the --tokenizer-model the data was made with", same_on_all_ranks=True)
    return None


def _check_corpora(config: Config) -> None:
    """See that corpora are whole, and have samples for what the run needs. Raises: UsageError: one does not."""
    training, infos = config.training, []
    for _, prefix in parse_blend(config.data.data_path):
        infos.append(check_prefix(prefix))
        check_content(prefix, most_bytes=CORPUS_READ_IN_FULL)
        check_vocabulary(prefix, config.model.vocab_size, full_scan_bytes=CORPUS_READ_IN_FULL)
    evaluated = training.eval_iters if training.eval_interval else 0
    check_shares(config.data.split, infos, config.model.seq_length, (training.train_iters, evaluated))


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


def planned(
    given: Config, world_size: int, tokenizer: Tokenizer | None, folder: Path | None
) -> tuple[Config, Schedule]:
    """Resolve a config, for a run that starts or for one that resumes, maybe with another batch size.

    Args:
        given: not resolved.
        world_size: ranks of the job.
        tokenizer: of the data; None for ``--mock-data`` without one.
        folder: the checkpoint to resume from, or None.

    Returns:
        The resolved config and the run's schedule.

    Raises:
        UsageError: as :meth:`Config.resolve`; or --use-checkpoint-opt-param-scheduler cannot be followed.
    """

    def resolve(config: Config) -> Config:
        if tokenizer is None:
            return with_vocabulary(config).resolve(world_size=world_size)
        return config.resolve(world_size=world_size, tokenizer_vocab_size=tokenizer.vocab_size)

    common = {} if folder is None else checkpointing.common_state(folder)
    if folder is None or checkpointing.takes_weights_only(given, common):
        if folder is not None and given.optimizer.use_checkpoint_opt_param_scheduler:
            raise UsageError(
                "--use-checkpoint-opt-param-scheduler needs a checkpoint of a training, but"
                f" {folder} gives its weights alone; leave it out",
                same_on_all_ranks=True,
            )
        config = resolve(given)
        return config, Schedule.of(config)
    saved = arguments.load_stored(folder / CONFIG_FILE)
    return schedule.resumed(given, saved, Schedule.from_state(common.get(SCHEDULE), saved), resolve)


def _consumed(config: Config, folder: Path | None) -> tuple[int, int]:
    """Return the iterations and sequences that the checkpoint to resume from has been trained for; 0 without one."""
    common = {} if folder is None else checkpointing.common_state(folder)
    if folder is None or checkpointing.takes_weights_only(config, common):
        return 0, 0
    try:
        progress = checkpointing.Progress(**common["progress"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"the checkpoint {folder} does not say how far it was trained; load an older one", same_on_all_ranks=True
        ) from error
    return progress.iteration, schedule.samples_of(progress.consumed_tokens, config.model.seq_length)


def _last_iteration(config: Config, course: Schedule, folder: Path | None) -> int:
    iteration, consumed = _consumed(config, folder)
    return iteration + course.iterations_left(consumed, config.training.global_batch_size)


def check_reports(config: Config, world_size: int, last_iteration: int) -> None:
    """See that a resolved config's alarms and profile can be what they are to be.

    Args:
        config: resolved.
        world_size: ranks of the job.
        last_iteration: at which the run ends.

    Raises:
        UsageError: one cannot.
    """
    alarms.check(config.logging.alarm, saves=config.checkpoint.save is not None)
    profiling.check(config, world_size, last_iteration)


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
    """Return the newest sound checkpoint to start from, if there is one; the config need not be resolved."""
    options = config.checkpoint
    load, save, pretrained = options.load, options.save, options.pretrained_checkpoint
    for flag, own in (("--load", load), ("--save", save)):
        if pretrained is not None and own is not None and Path(pretrained).resolve() == Path(own).resolve():
            raise UsageError(
                f"--pretrained-checkpoint {pretrained} is the {flag} folder too; leave it out to resume that run, or"
                f" give {flag} a folder of this run's own",
                same_on_all_ranks=True,
            )
    folders = checkpointing.starting_checkpoints(config)
    if not folders and pretrained is not None:
        raise UsageError(f"--pretrained-checkpoint {pretrained} holds no checkpoint; give a folder that does")
    if not folders and load is not None and (save is None or Path(load).resolve() != Path(save).resolve()):
        raise UsageError(f"--load {load} holds no checkpoint; give a folder that does, or leave it out")
    if save is not None:
        checkpointing.check_save_folder(save, folders[0] if folders else None)
    return first_sound(folders, checkpoint_folders.fault)


def _check_checkpoint(config: Config, course: Schedule, folder: Path | None) -> None:
    """See that a run can start from a checkpoint, and has not exceeded its length already."""
    common = {} if folder is None else _check_start(folder, config)
    if folder is not None and not checkpointing.takes_weights_only(config, common):
        saved = arguments.load_stored(folder / CONFIG_FILE)
        schedule.check_end(folder, config, saved, course, _consumed(config, folder)[1])
    if config.optimizer.radius == "from-weights" and not common.get(checkpointing.RADII):
        raise UsageError(
            "--radius from-weights needs --load or --pretrained-checkpoint of a checkpoint that has radii; import one"
            " with tools/convert_checkpoint.py --radius from-weights"
        )


def _check_start(folder: Path, config: Config) -> dict[str, Any]:
    """See that a run can start from a checkpoint; return the values that all ranks share in it.

    Raises:
        UsageError: it cannot.
    """
    common = checkpointing.common_state(folder)
    weights_only = checkpointing.takes_weights_only(config, common)
    check_compatible(folder, config, weights_only=weights_only)
    # Of what a tool wrote, no run has reported, though its config may name the folder of this run's events.
    if not common.get(checkpointing.WEIGHTS_ONLY, False):
        lineage.check_tensorboard(config, folder, weights_only=weights_only)
    return common


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
    folders = checkpointing.starting_checkpoints(config)
    folder = first_sound(folders[folders.index(found) :], _fault_of_shares)
    if folder is not None and folder != found:
        _check_start(folder, config)
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
