"""What comparing replicas costs: steps and comparisons of one run in turns, medians, as a share of the time.

torchrun --standalone --nproc-per-node 2 benchmarks/replica_check_cost/run.py
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_corpus
from benchmarks.models import MODELS, VOCABULARY, config_of
from benchmarks.turns import in_turns
from megatron_hyperp import device
from megatron_hyperp.errors import run_command

INTERVAL = 100
WARM_UPS = 2


def seconds(work: Callable[[], object]) -> list[float]:
    """Time something that all ranks do, from the moment at which all are ready."""
    dist.barrier()
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    return [time.perf_counter() - started]


def measure(name: str, repeats: int, folder: Path, prefix: str) -> str:
    """Train a model, two micro-batches on each rank; return a line with medians."""
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    (folder / name).mkdir(exist_ok=True)
    ranks = dist.get_world_size()
    config = config_of(name, folder / name, prefix, micro_batches=2 * ranks)
    config.training.check_weight_hash_across_dp_replicas_interval = INTERVAL
    config = config.resolve(world_size=ranks, tokenizer_vocab_size=VOCABULARY)
    trainer = Trainer(config, load_tokenizer(f"null:{VOCABULARY}"), None)
    batches = trainer._batches(trainer.train_set, 0)

    def step() -> None:
        trainer._train_batch(batches)
        trainer.optimizer.step()

    ways = {"step": lambda: seconds(step), "check": lambda: seconds(lambda: trainer.replicas.check(0, "here"))}
    medians = in_turns(ways, repeats, warm_ups=WARM_UPS)
    parameters = sum(parameter.numel() for parameter in trainer.optimizer.exchange.bucket_of)
    trainer.close_reports()
    parallel_state.destroy_model_parallel()
    (plain,), (check,) = medians["step"], medians["check"]
    return (
        f"{name:8s} {parameters / 1e6:5.1f}M parameters a rank, step {1e3 * plain:8.1f} ms, comparison"
        f" {1e3 * check:7.2f} ms ({check / plain:.2%} of a step); every {INTERVAL} steps:"
        f" {check / INTERVAL / plain:.4%}"
    )


def main(argv: list[str]) -> None:
    """Measure what is asked for; rank 0 prints it."""
    parser = argparse.ArgumentParser(description="Time steps and comparisons of replicas, in turns.")
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
            line = measure(name, options.repeats, folder, prefixes[0])
            if dist.get_rank() == 0:
                print(line, flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
