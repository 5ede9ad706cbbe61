"""Is what was written what was read? Every tensor, and the logits where both models can run here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from megatron_hyperp.convert import hf_config
from megatron_hyperp.convert.huggingface import load_transformers
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.source import Source
from megatron_hyperp.convert.state import read_mapping
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.inference import model_on_one_rank

# Largest difference of logits, over the largest logit if that is above 1. fp32: sums in another order; else: folded
# weights are rounded anew.
LOGITS = {torch.float32: 1e-4}
LOGITS_ROUNDED = 5e-2
# Copies of a model in fp32 that comparing logits takes.
_COPIES = 3
_TOKENS = (2, 64)


def compare(source: Source, written: Source, *, advance: Callable[[int], None]) -> str:
    """Compare every parameter, and say how they agree.

    A parameter that was written in another dtype is read, cast to it, and compared up to the two roundings.

    Raises:
        UsageError: one differs.
    """
    rounded = 0
    for name in source.parameters:
        before, after = source.read(name), written.read(name)
        advance(before.nbytes)
        if before.dtype == after.dtype:
            same = torch.equal(_bits(before), _bits(after))
        else:
            rounded += 1
            epsilon = max(torch.finfo(before.dtype).eps, torch.finfo(after.dtype).eps)
            same = torch.allclose(before.float(), after.float(), rtol=2 * epsilon, atol=torch.finfo(after.dtype).tiny)
        if not same:
            raise UsageError(f"verification failed: {name} came back differently; nothing was kept of the output")
    count = len(source.parameters)
    return f"{count} tensors agree bit for bit" if not rounded else f"{count} tensors agree up to rounding"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers as bytes: 0 and -0 differ, and what is not a number is itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def compare_logits(source: Source, folder: Path, dtype: torch.dtype) -> str:
    """Compare our logits with those of transformers on random tokens, and say how they agree, or why not compared.

    Args:
        source: our side.
        folder: of Hugging Face's side.
        dtype: of the weights there.

    Raises:
        UsageError: they differ by more than rounding.
    """
    parameters = sum(torch.Size(shape.shape).numel() for shape in source.parameters.values())
    need, free = _COPIES * 4 * parameters, psutil.virtual_memory().available
    if need > free:
        return f"logits not compared: that takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    # One side may have padding that the other has not.
    there = hf_config.from_json(read_mapping(folder / "config.json"), str(folder)).model.vocab_size
    rows = min(source.config.model.vocab_size, there)
    tokens = torch.randint(rows, _TOKENS, generator=torch.Generator().manual_seed(0))
    theirs = logits_of_transformers(folder, tokens)[..., :rows]
    with model_on_one_rank(source.config, source.read) as logits:
        ours = logits(tokens)[..., :rows].cpu()
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not difference <= LOGITS.get(dtype, LOGITS_ROUNDED) * max(1.0, largest):
        raise UsageError(
            f"verification failed: logits differ from those of transformers by {difference:.3g}, of {largest:.3g};"
            " nothing was kept of the output"
        )
    return f"logits agree with those of transformers within {difference:.2g}"


@torch.no_grad()
def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits [batch, sequence, V] of a folder's model in fp32; no code of the folder's is run."""
    model = load_transformers(folder, torch.float32)
    result: torch.Tensor = model(tokens).logits
    return result


def compare_stored(source: HyperPSource, written: HyperPSource, *, advance: Callable[[int], None]) -> str:
    """Compare all tensors of two checkpoints, the optimizer's among them, and what ranks share. Raises: as above."""
    before, after = list(source.reader.slabs()), list(written.reader.slabs())
    if before != after:
        raise UsageError("verification failed: other tensors came back; nothing was kept of the output")
    for slab in before:
        tensor = source.reader.read(slab)
        advance(tensor.nbytes)
        if not torch.equal(_bits(tensor), _bits(written.reader.read(slab))):
            raise UsageError(f"verification failed: {slab} came back differently; nothing was kept of the output")
    return f"{len(before)} tensors of weights and optimizer state agree bit for bit"
