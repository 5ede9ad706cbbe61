"""What --fp8-param-gather saves and costs: weights gathered in FP8 and in bf16 from one optimizer in turns.

torchrun --standalone --nproc-per-node 2 benchmarks/fp8_gather/run.py
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

WARM_UPS = 2


def measure(name: str, repeats: int, folder: Path, prefix: str) -> str:
    """Build a model in FP8 (emulated); gather its weights both ways; return a line with medians and bytes."""
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.optim.fp8_gather import Fp8Bucket
    from megatron_hyperp.training.loop import Trainer

    ranks = dist.get_world_size()
    config = config_of(name, folder, prefix, micro_batches=ranks)
    training = config.training
    training.bf16 = training.fp8_emulation = training.fp8_param_gather = True
    training.fp8_format = "hybrid"
    trainer = Trainer(
        config.resolve(world_size=ranks, tokenizer_vocab_size=VOCABULARY), load_tokenizer(f"null:{VOCABULARY}"), None
    )
    exchange = trainer.optimizer.exchange

    def gather(*, exact: bool) -> None:
        exchange.start_param_sync(exact=exact)
        exchange.finish_param_sync()

    ways = {
        "bf16": lambda: seconds(lambda: gather(exact=True)),
        "FP8": lambda: seconds(lambda: gather(exact=False)),
    }
    medians = in_turns(ways, repeats, warm_ups=WARM_UPS)
    whole = sum(bucket.weights.nbytes for bucket in exchange.buckets)
    halved = sum(bucket.weights.nbytes for bucket in exchange.buckets if isinstance(bucket, Fp8Bucket)) // 2
    trainer.close_reports()
    parallel_state.destroy_model_parallel()
    (plain,), (rounded,) = medians["bf16"], medians["FP8"]
    return (
        f"{name:8s} {whole / 2**20:6.2f} MiB in bf16, {(whole - halved) / 2**20:6.2f} with FP8"
        f" ({(whole - halved) / whole:.3f}); {1e3 * plain:7.2f} ms in bf16, {1e3 * rounded:7.2f} with FP8"
        f" ({rounded / plain:.2f})"
    )


if __name__ == "__main__":
    run_command(lambda argv: run(argv, "Gather weights in FP8 and in bf16, in turns.", measure))
