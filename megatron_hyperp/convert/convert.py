"""From one format to another: what the command line does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hyperp.convert import hf_config, megatron_arguments, megatron_lm
from megatron_hyperp.convert.averaging import AverageSource, newest_checkpoints
from megatron_hyperp.convert.hyperp import (
    HyperPSource,
    check_layout,
    stored_items,
    write_resharded,
    write_weights,
)
from megatron_hyperp.convert.source import Source
from megatron_hyperp.convert.vocabulary import padded_for_ranks
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import finished_folder
from megatron_hyperp.progress import ProgressBar

FROM = ("hyperp", "hf", "megatron-lm", "archscale")
TO = ("hyperp", "hf", "megatron-lm")
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion.

    Attributes:
        source: format to read: one of :data:`FROM`.
        target: format to write: one of :data:`TO`.
        input: folder or file to read.
        output: folder to write, which is not there yet.
        layout: that a torch_dist output is cut for.
        dtype: of the weights written; None for the source's.
        shard_bytes: of a safetensors file; None for :data:`SHARD_BYTES`.
        tokenizer: that goes with the weights; "none", or None for the one that the source names.
        radius: of the spheres in a later training: "stateless", or "from-weights".
        average: so many of the newest checkpoints; None: no mean.
        weights_only: leave out the optimizer's state.
        verify: compare the output with the input.
        keep_padding: export the rows of the vocabulary that are padding too.
        prepend_bos: whether documents begin with the beginning-of-sequence token; None for what the source records.
        config: YAML of the model, for formats that have none.
    """

    source: str
    target: str
    input: str
    output: str
    layout: Layout
    dtype: torch.dtype | None
    shard_bytes: int | None
    tokenizer: str | None
    radius: str
    average: int | None
    weights_only: bool
    verify: bool
    keep_padding: bool = False
    prepend_bos: bool | None = None
    config: str | None = None

    @property
    def resharding(self) -> bool:
        """Whether a whole checkpoint is cut anew, its optimizer's state with it."""
        same = self.source == self.target == "hyperp"
        return same and self.average is None and not (self.weights_only or self.dtype or self.radius == "from-weights")


def open_source(kind: str, path: str | Path, config: str | None = None) -> Source:
    """Open a checkpoint in a format of :data:`FROM`.

    Args:
        kind: the format.
        path: folder or file.
        config: YAML of the model, for ArchScale's.

    Raises:
        UsageError: it is no such checkpoint, is damaged, or cannot be expressed here.
    """
    if kind == "hyperp":
        return HyperPSource(path)
    if kind == "hf":
        from megatron_hyperp.convert.huggingface import HuggingFaceSource

        return HuggingFaceSource(path)
    if kind == "megatron-lm":
        from megatron_hyperp.convert.megatron_lm import MegatronSource

        return MegatronSource(path)
    if kind == "archscale":
        from megatron_hyperp.convert.archscale import ArchScaleSource

        return ArchScaleSource(path, config)
    raise UsageError(f"--from {kind} is not known; allowed are {', '.join(FROM)}")


def convert(job: Job, *, dry_run: bool = False, say: Callable[[str], None] = print) -> None:
    """Convert, or only say what would be done.

    Raises:
        UsageError: anything that cannot be done; nothing is left behind then.
    """
    _check_flags(job)
    source = _source(job)
    whole = source if job.resharding and isinstance(source, HyperPSource) and source.whole else None
    if job.prepend_bos is not None:
        source.config.data.prepend_bos = job.prepend_bos
    given = rows = source.config.model.vocab_size
    if job.target == "hf":
        _check_hf(job)
    else:
        # Our own checkpoints keep their rows: the radius of the output layer's sphere follows from them.
        pads = source.extras.foreign or job.target == "megatron-lm"
        padded = padded_for_ranks(source, job.layout.tp) if pads else source
        check_layout(padded, job.layout)
        rows = padded.config.model.vocab_size
        if job.target == "megatron-lm":
            megatron_lm.check(source.config)
        else:
            source = padded
    size = sum(item.nbytes for item in stored_items(whole)) if whole else source.nbytes
    for line in describe(job, source, whole=whole is not None, size=size):
        say(line)
    if rows > given:
        say(f"the vocabulary of {given:,} is padded with zeros to {rows:,} for TP {job.layout.tp}")
    if dry_run:
        say("dry run: nothing is written")
        return
    with finished_folder(Path(job.output)) as partial:
        with ProgressBar(size, _in_words("converted", size)) as bar:
            _write(job, source, partial, whole=whole, advance=_counting(bar))
        if job.verify:
            for line in _verify(job, source, partial, whole=whole, size=size):
                say(line)
    say(f"wrote {job.output}")


def _source(job: Job) -> Source:
    if job.average is not None and job.radius == "from-weights":
        raise UsageError("--average puts matrices on the spheres of their run; leave out --radius from-weights")
    if job.average is not None:
        return AverageSource(newest_checkpoints(job.input, job.average))
    source = open_source(job.source, job.input, job.config)
    if job.radius == "from-weights":
        from megatron_hyperp.convert.radii import take_radii_from_weights

        take_radii_from_weights(source)
    return source


def _check_flags(job: Job) -> None:
    """Refuse flags that would have no effect."""
    for flag, given, needed in (
        ("--radius from-weights", job.radius == "from-weights" and job.target != "hyperp", "--to hyperp"),
        ("--average", job.average is not None and job.source != "hyperp", "--from hyperp"),
        ("--weights-only", job.weights_only and not job.source == job.target == "hyperp", "--from and --to hyperp"),
        ("--max-shard-size", job.shard_bytes is not None and job.target != "hf", "--to hf"),
        ("--tokenizer", job.tokenizer is not None and job.target != "hf", "--to hf"),
        ("--keep-padding", job.keep_padding and job.target != "hf", "--to hf"),
        ("--config", job.config is not None and job.source != "archscale", "--from archscale"),
    ):
        if given:
            raise UsageError(f"{flag} needs {needed}; leave it out")
    if job.verify and "hf" in (job.source, job.target) and importlib.util.find_spec("transformers") is None:
        raise UsageError("--verify compares logits with transformers; pip install megatron-hyperp[convert]")


def _check_hf(job: Job) -> None:
    if (job.layout.tp, job.layout.pp, job.layout.ep) != (1, 1, 1):
        raise UsageError("--tp, --pp and --ep cut torch_dist checkpoints; with --to hf give --max-shard-size instead")


def describe(job: Job, source: Source, *, whole: bool, size: int) -> list[str]:
    """Say in lines what is read and what will be written."""
    model, experts = source.config.model, source.config.moe.num_experts
    count = sum(torch.Size(shape.shape).numel() for shape in source.parameters.values())
    kind = f"{experts} experts a layer" if experts else "dense"
    lines = [
        f"read {job.source} {job.input}: {model.num_layers} layers, width {model.hidden_size},"
        f" {model.num_attention_heads} heads in {model.num_query_groups} groups, {kind}, {count:,} parameters"
    ]
    dtype = str(job.dtype or source.dtype("embedding.word_embeddings.weight")).removeprefix("torch.")
    what = "weights and optimizer state" if whole else "weights"
    lines.append(f"write {job.target} {job.output}: {what} in {dtype}, {size / 1e9:.3f} GB")
    if job.target == "hf":
        shard = (job.shard_bytes or SHARD_BYTES) / 1e9
        lines.append(f"as {hf_config.architecture(source.config)}, files of at most {shard:g} GB")
        if not (model.unpadded_vocab_size or job.keep_padding) and "none" in (
            job.tokenizer,
            source.extras.tokenizer or "none",
        ):
            lines.append(
                "note: the checkpoint does not record its vocabulary before padding; without a tokenizer all"
                f" {model.vocab_size:,} rows are exported"
            )
    else:
        lines.append(f"cut for TP {job.layout.tp}, PP {job.layout.pp}, EP {job.layout.ep}")
    if job.target == "hyperp" and not whole:
        lines.append("without optimizer state: a training that loads it begins at its first iteration")
    if job.target == "hyperp" and job.radius == "stateless" and source.extras.foreign:
        lines.append(
            "note: a training will scale matrices to the radii of their shapes, which changes what the model computes;"
            " --radius from-weights keeps their own"
        )
    if job.target == "megatron-lm":
        lines.append(f"for Megatron-LM's flags --load {job.output} {megatron_arguments.flags(source.config)}")
    if job.average is not None:
        lines.append(f"mean of the newest {job.average} checkpoints, matrices put back on their spheres")
    return lines


def _write(
    job: Job, source: Source, partial: Path, *, whole: HyperPSource | None, advance: Callable[[int], None]
) -> None:
    if job.target == "hf":
        from megatron_hyperp.convert import huggingface

        tokenizer = source.extras.tokenizer if job.tokenizer is None else job.tokenizer
        huggingface.write(
            partial,
            source,
            dtype=job.dtype,
            shard_bytes=job.shard_bytes or SHARD_BYTES,
            tokenizer=None if tokenizer == "none" else tokenizer,
            advance=advance,
            keep_padding=job.keep_padding,
        )
    elif job.target == "megatron-lm":
        megatron_lm.write(partial, source, layout=job.layout, dtype=job.dtype, advance=advance)
    elif whole:
        write_resharded(partial, whole, layout=job.layout, advance=advance)
    else:
        write_weights(partial, source, layout=job.layout, dtype=job.dtype, advance=advance)


def _verify(job: Job, source: Source, partial: Path, *, whole: HyperPSource | None, size: int) -> list[str]:
    """Compare, and say how input and output agree."""
    from megatron_hyperp.convert import verify

    written = open_source(job.target, partial)
    with ProgressBar(size, _in_words("verified", size)) as bar:
        if whole:
            assert isinstance(written, HyperPSource)
            lines = [verify.compare_stored(whole, written, advance=_counting(bar))]
        else:
            lines = [verify.compare(source, written, advance=_counting(bar))]
    dtypes = [side.dtype("embedding.word_embeddings.weight") for side in (source, written)]
    dtype = max(dtypes, key=lambda kind: torch.finfo(kind).eps)
    if job.target == "hf":
        lines.append(verify.compare_logits(source, partial, dtype))
    elif job.source == "hf":
        lines.append(verify.compare_logits(written, Path(job.input), dtype))
    return lines


def _counting(bar: ProgressBar) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        bar.update(done)

    return advance


def _in_words(verb: str, size: int) -> Callable[[int, float], str]:
    return lambda done, seconds: f"{verb} {done / 1e9:.2f} of {size / 1e9:.2f} GB ({done / 1e9 / seconds:.2f} GB/s)"
