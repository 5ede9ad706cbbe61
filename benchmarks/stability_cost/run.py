"""What watching a step costs: watched and plain steps of one run in turns, medians, as a share of the step's time."""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_corpus
from benchmarks.models import VOCABULARY, config_of
from megatron_hyperp import device
from megatron_hyperp.errors import run_command

INTERVAL = 10
WARM_UPS = 3
WATCHED = ("dense", "experts")


def measure(name: str, repeats: int, folder: Path) -> str:
    """Train a model, four micro-batches a step; return a line with medians."""
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    (folder / name).mkdir()
    config = config_of(name, folder / name, write_corpus(folder, VOCABULARY), micro_batches=4)
    config.logging.stability_interval = INTERVAL
    config = config.resolve(tokenizer_vocab_size=VOCABULARY)
    trainer = Trainer(config, load_tokenizer(f"null:{VOCABULARY}"), None)
    batches = trainer._batches(trainer.train_set, 0)
    spent: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(WARM_UPS + repeats):
        for watched, seconds in spent.items():
            device.synchronize()
            started = time.perf_counter()
            with trainer.stability.watch() if watched else contextlib.nullcontext():
                trainer._train_batch(batches)
                trainer.optimizer.step()
            if watched:
                trainer.stability.collect()
            device.synchronize()
            seconds.append(time.perf_counter() - started)
    plain, watched_step = (statistics.median(seconds[WARM_UPS:]) for seconds in spent.values())
    trainer.close_reports()
    parallel_state.destroy_model_parallel()
    extra = watched_step / plain - 1
    return (
        f"{name:8s} plain step {1e3 * plain:8.1f} ms, watched {1e3 * watched_step:8.1f} ms (x {1 + extra:.3f});"
        f" at interval {INTERVAL}: {extra / INTERVAL:.2%} of the time"
    )


def main(argv: list[str]) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description="Time steps with and without stability indicators, in turns.")
    parser.add_argument("--models", nargs="+", choices=WATCHED, default=list(WATCHED), help="[all]")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of steps of which the medians count [7]")
    options = parser.parse_args(argv)
    device.adapt_megatron()
    device.init_process_group(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            print(measure(name, options.repeats, Path(folder)), flush=True)


if __name__ == "__main__":
    run_command(main)
