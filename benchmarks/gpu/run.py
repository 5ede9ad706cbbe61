"""Time whole training steps on this machine's GPU: tokens/s, MFU, and the optimizer's share of a step.

The paper's models (``--depths``; by default depth 8 and the deepest whose training fits this GPU, by the plan), in bf16
and FP8, under hyperp and under the baselines, each in turn in one run. Documents are random tokens: what is timed does
not depend on them, but for the experts' loads, which random tokens spread evenly.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_corpus
from megatron_hyperp import arguments, device, estimate, libraries
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.planning.layouts import Cluster, layouts
from megatron_hyperp.text import aligned

OPTIMIZERS = ("hyperp", "adamw", "muon")
DEPTHS = (24, 20, 16, 12, 8)
MOE = "--moe-sparsity 8 --moe-topk 8 --moe-shared-expert"
HEADERS = ["model", "precision", "optimizer", "tokens/s", "MFU", "step ms", "optimizer", "peak GiB"]


def parser() -> argparse.ArgumentParser:
    """Return the benchmark's flags; what is left over goes to the trainer."""
    result = argparse.ArgumentParser(description="Time training steps; further flags are the trainer's.")
    result.add_argument("--depths", nargs="+", type=int, help="[8 and the deepest that fits]")
    result.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="[all]")
    result.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp8"), default=["bf16", "fp8"])
    result.add_argument("--moe", action="store_true", help="mixtures of experts, S 8, K 8, one of them shared")
    result.add_argument("--steps", type=int, default=10, help="timed, of which the median counts [10]")
    result.add_argument("--warm-ups", type=int, default=3, help="[3]")
    return result


def config_of(depth: int, optimizer: str, precision: str, moe: bool, more: list[str]) -> Config:
    """Return an unresolved config of the paper's model; 64 sequences are a batch."""
    flags = f"--depth {depth} --optimizer {optimizer} --vocab-size 32000 --global-batch-size 64 --eval-interval 0"
    flags += " --quiet --stability-interval 0 --log-interval 1000000 --train-iters 1000"
    flags += "" if precision == "fp32" else " --bf16"
    flags += " --fp8-format hybrid" if precision == "fp8" else ""
    flags += f" {MOE}" if moe else ""
    return arguments.parse([*flags.split(), *more], description="")


def fitting(config: Config) -> Config | None:
    """Return the resolved config with the fastest recomputation that fits one GPU of this kind; None if none does."""
    if not device.has_cuda():
        return config.resolve()
    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = dataclasses.replace(device.gpu() or GPUS["H100"], memory=memory)
    with device.planning_for("cuda"):
        found, _ = layouts(config, Cluster(gpu, 1))
    return found[0].config if found else None


def time_steps(config: Config, warm_ups: int, steps: int) -> tuple[float, float, float]:
    """Train; return median seconds of a step and of its optimizer, and peak GiB."""
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    with tempfile.TemporaryDirectory() as folder:
        config.data.data_path = [write_corpus(Path(folder), config.model.vocab_size)]
        config.logging.run_dir = folder
        if device.has_cuda():
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(config, load_tokenizer(f"null:{config.model.vocab_size}"), None)
        batches = trainer._batches(trainer.train_set, 0)
        whole, optimizer = [], []
        for _ in range(warm_ups + steps):
            device.synchronize()
            started = time.perf_counter()
            trainer._train_batch(batches)
            device.synchronize()
            reached = time.perf_counter()
            trainer.optimizer.step()
            device.synchronize()
            ended = time.perf_counter()
            whole.append(ended - started)
            optimizer.append(ended - reached)
        trainer.close_reports()
        parallel_state.destroy_model_parallel()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.has_cuda() else float("nan")
    return statistics.median(whole[warm_ups:]), statistics.median(optimizer[warm_ups:]), peak


def row_of(config: Config, name: str, precision: str, warm_ups: int, steps: int) -> list[str]:
    """Measure one training; return its row of the table."""
    seconds, optimizer, peak = time_steps(config, warm_ups, steps)
    rate, best = config.batch_tokens / seconds, config.logging.peak_tflops or device.peak_tflops()
    mfu = estimate.train_flops_per_token(config.model, config.moe) * rate / (best * 1e12) if best else None
    return [
        name,
        precision,
        config.optimizer.optimizer,
        f"{rate:,.0f}",
        f"{mfu:.1%}" if mfu else "not known",
        f"{1e3 * seconds:.1f}",
        f"{optimizer / seconds:.1%}",
        f"{peak:.1f}",
    ]


def depths_of(options: argparse.Namespace, more: list[str]) -> list[int]:
    """Return the depths asked for, else 8 and the deepest that fits."""
    if options.depths:
        return list(options.depths)
    first = options.optimizers[0], options.precisions[0], options.moe, more
    deepest = next((depth for depth in DEPTHS if fitting(config_of(depth, *first))), 8)
    return sorted({8, deepest})


def rows(options: argparse.Namespace, more: list[str]) -> Iterator[list[str]]:
    """Measure everything in turn."""
    for depth in depths_of(options, more):
        for precision in options.precisions:
            lacking = libraries.lacks_fp8("tensorwise") if precision == "fp8" else None
            if lacking:
                print(f"left out: fp8 needs {lacking}")
                continue
            for optimizer in options.optimizers:
                config = fitting(config_of(depth, optimizer, precision, options.moe, more))
                if config is None:
                    print(f"left out: d{depth}, {precision}, {optimizer} does not fit this GPU by the plan")
                    continue
                recomputed = config.training.recompute_granularity
                name = f"d{depth}{', experts' if options.moe else ''}"
                name += "" if recomputed == "none" else f", {recomputed} recomputation"
                yield row_of(config, name, precision, options.warm_ups, options.steps)


def main(argv: list[str]) -> None:
    """Measure and print a table.

    Raises:
        UsageError: no GPU, and no depth given.
    """
    options, more = parser().parse_known_args(argv)
    if not device.has_cuda() and not options.depths:
        raise UsageError("there is no GPU; give a small model by --depths and the trainer's flags to time it on CPU")
    device.adapt_megatron()
    device.init_process_group(10)
    versions = f"torch {torch.__version__}, {device.describe()}"
    print(f"{time.strftime('%Y-%m-%d')}, {versions}", flush=True)
    table = [HEADERS]
    for row in rows(options, more):
        print("  ".join(row), flush=True)
        table.append(row)
    print()
    print("\n".join(aligned(table)) if len(table) > 1 else "nothing was measured")


if __name__ == "__main__":
    run_command(main)
