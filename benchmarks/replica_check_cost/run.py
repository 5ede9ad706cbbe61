"""What comparing replicas costs: steps and comparisons of one run in turns, medians, as a share of the time.

torchrun --standalone --nproc-per-node 2 benchmarks/replica_check_cost/run.py
"""

import sys
from pathlib import Path

import torch.distributed as dist

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.models import VOCABULARY, config_of
from benchmarks.ranks import run, seconds
from benchmarks.turns import in_turns
from megatron_hyperp.errors import run_command

INTERVAL = 100
WARM_UPS = 2


def measure(name: str, repeats: int, folder: Path, prefix: str) -> str:
    """Train a model, two micro-batches on each rank; return a line with medians."""
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    ranks = dist.get_world_size()
    config = config_of(name, folder, prefix, micro_batches=2 * ranks)
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


if __name__ == "__main__":
    run_command(lambda argv: run(argv, "Time steps and comparisons of replicas, in turns.", measure))
