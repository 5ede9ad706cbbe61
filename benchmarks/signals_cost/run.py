"""What agreeing to stop costs: votes in the all-reduce of the norm, or in one of their own, in turns, medians.

torchrun --standalone --nproc-per-node 2 benchmarks/signals_cost/run.py
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_hyperp import device
from megatron_hyperp.errors import run_command

VOTES = 3
# Numbers in the collectives of one step.
WAYS = {"norm alone": (1,), "votes beside it": (1 + VOTES,), "votes apart": (1, VOTES)}


def seconds(sizes: tuple[int, ...]) -> float:
    """Time the all-reduces of one step, until the host has read them."""
    started = time.perf_counter()
    for size in sizes:
        numbers = torch.zeros(size, dtype=torch.float64, device=device.device())
        dist.all_reduce(numbers)
        numbers.tolist()
    return time.perf_counter() - started


def main(argv: list[str]) -> None:
    """Measure the ways in turns; rank 0 prints them and their ratios to the first."""
    parser = argparse.ArgumentParser(description="cost of the votes in each step")
    parser.add_argument("--repeats", type=int, default=2000, help="of each way")
    repeats = parser.parse_args(argv).repeats
    device.init_process_group(2)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, sizes in WAYS.items():
            times[name].append(seconds(sizes))
    if dist.get_rank() == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            print(f"{name:16} {1e6 * median:7.1f} us  x {median / medians['norm alone']:.2f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
