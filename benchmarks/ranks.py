"""What benchmarks of models under torchrun share: a process group, one corpus for all ranks, a line for each model."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from benchmarks.corpus import write_corpus
from benchmarks.models import MODELS, VOCABULARY
from megatron_hyperp import device


def seconds(work: Callable[[], object]) -> list[float]:
    """Time something that all ranks do, from the moment at which all are ready."""
    dist.barrier()
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    return [time.perf_counter() - started]


def run(argv: list[str], description: str, measure: Callable[[str, int, Path, str], str]) -> None:
    """Measure the models that are asked for; rank 0 prints a line of each.

    Args:
        argv: flags.
        description: for ``--help``.
        measure: takes a model's name, repeats, a folder and the prefix of a corpus; returns the line.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="[all]")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of which the medians count [15]")
    options = parser.parse_args(argv)
    device.adapt_megatron()
    device.init_process_group(2)
    # All ranks read rank 0's corpus.
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        prefixes = [write_corpus(folder, VOCABULARY) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(prefixes, src=0)
        for name in options.models:
            (folder / name).mkdir(exist_ok=True)
            line = measure(name, options.repeats, folder / name, prefixes[0])
            if dist.get_rank() == 0:
                print(line, flush=True)
        dist.barrier()
    dist.destroy_process_group()
