"""Time Newton-Schulz over tensor-parallel ranks: our strategies beside what others do, in one run.

Each family is orthogonalized by every strategy and by two baselines written the way other codebases do it: all-gather
and redundant Newton-Schulz, matrix by matrix; and one Gram all-reduce per iteration and matrix. AdamW on the same
shards shows the scale. Medians over repetitions; every ratio is within the run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.optim.orthogonalize import NewtonSchulz, coefficient_schedule
from megatron_hyperp.optim.tensor_parallel import STRATEGIES, Job, choose, costs, machine_of, orthogonalize_family

# (count, rows, columns, sharded dimension) of families. "design" is the shape of the claims; the others are the paper's
# models at a quarter of the width: fused QKV, attention projection, gate and up, down.
FAMILIES = {
    "design": [(8, 2048, 512, 0)],
    "d8": [(8, 640, 256, 0), (8, 256, 512, 1), (8, 2048, 256, 0), (8, 256, 1024, 1)],
    "d24": [(24, 1664, 768, 0), (24, 768, 1536, 1), (24, 6144, 768, 0), (24, 768, 3072, 1)],
    "moe-d8": [(64, 256, 256, 0), (64, 256, 128, 1)],
    "moe-d24": [(48, 768, 768, 0), (48, 768, 384, 1)],
    "odd": [(3, 1024, 256, 0), (1, 2048, 512, 0), (5, 256, 1024, 0), (4, 256, 256, -1)],
}
Family = tuple[int, int, int, int]


def redundant_per_matrix(shards: torch.Tensor, split: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather one matrix after the other; every rank runs the standard iteration on each."""
    results = []
    for shard in shards:
        parts = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(parts, shard, group=group)
        whole = torch.cat(parts, dim=split)
        x = whole.mT if whole.shape[0] > whole.shape[1] else whole
        x = x / x.norm()
        for a, b, c in coefficient_schedule("quintic", 5):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        whole = x.mT if whole.shape[0] > whole.shape[1] else x
        results.append(whole.chunk(group.size(), dim=split)[group.rank()])
    return torch.stack(results)


def all_reduce_per_iteration(shards: torch.Tensor, split: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All-reduce the Gram matrix of one matrix in each iteration; rows whole, long side sharded."""
    results = []
    for shard in shards:
        x = shard.mT if split == 0 else shard
        square = x.square().sum()
        dist.all_reduce(square, group=group)
        x = x / square.sqrt()
        for a, b, c in coefficient_schedule("quintic", 5):
            gram = x @ x.mT
            dist.all_reduce(gram, group=group)
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        results.append(x.mT if split == 0 else x)
    return torch.stack(results)


def adamw(shards: torch.Tensor) -> torch.Tensor:
    """One fused-by-foreach AdamW step on the same elements."""
    weight = torch.nn.Parameter(torch.zeros_like(shards))
    weight.grad = shards
    torch.optim.AdamW([weight], foreach=True).step()
    return weight


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median over repetitions of the slowest rank's time."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        function()
        spent = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        times.append(float(spent))
    return statistics.median(times[1:])


def measure(family: Family, repeats: int, group: dist.ProcessGroup) -> dict[str, float]:
    """Return seconds by method."""
    count, rows, columns, split = family
    ranks = group.size()
    shape = [size // ranks if dim == split else size for dim, size in enumerate((rows, columns))]
    shards = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0 if split < 0 else group.rank()))
    ns = NewtonSchulz(dtype=torch.float32)
    job = Job(count, rows, columns, split, ranks)
    methods: dict[str, Callable[[], object]] = {}
    for name in ("auto", *costs(job, ns)):
        methods[name] = partial(orthogonalize_family, shards, ns, group=group, partition_dim=split, strategy=name)
    if split >= 0 and (rows, columns)[split] >= (rows, columns)[1 - split]:
        methods["redundant"] = lambda: redundant_per_matrix(shards, split, group)
        methods["all-reduce"] = lambda: all_reduce_per_iteration(shards, split, group)
    methods["AdamW"] = lambda: adamw(shards)
    return {name: median_seconds(method, repeats) for name, method in methods.items()}


def report(family: Family, seconds: dict[str, float], ranks: int) -> str:
    """Return one family's block of the table."""
    count, rows, columns, split = family
    ns, job = NewtonSchulz(dtype=torch.float32), Job(count, rows, columns, split, ranks)
    predicted, machine = costs(job, ns), machine_of(torch.empty(0))
    best = min(seconds[name] for name in STRATEGIES if name in seconds)
    lines = [f"{count} x [{rows}, {columns}], dim {split}, {ranks} ranks: auto takes {choose(job, ns, machine)}"]
    for name, value in seconds.items():
        line = f"  {name:11s} {value / best:6.2f} x best  {1e3 * value:9.2f} ms"
        if name in predicted:
            cost = predicted[name]
            line += f"  predicted {1e3 * cost.seconds(machine):9.2f} ms  {cost.collectives} collectives"
            line += f"  {cost.sent / 1e6:8.2f} MB  {cost.flops / 1e9:8.2f} GFLOP a rank"
        lines.append(line)
    return "\n".join(lines)


def work(rank: int, ranks: int, families: list[Family], repeats: int, port: str) -> None:
    """Run one rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    for family in families:
        seconds = measure(family, repeats, group)
        if rank == 0:
            print(report(family, seconds, ranks), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str]) -> None:
    """Measure the chosen families."""
    parser = argparse.ArgumentParser(description="Time Newton-Schulz strategies over tensor-parallel ranks on gloo.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="tensor-parallel sizes [2 4]")
    parser.add_argument("--families", nargs="+", default=["design"], help=f"of {', '.join(FAMILIES)} [design]")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of which the median counts [5]")
    parser.add_argument("--port", default="29577", help="TCP port for the ranks [29577]")
    options = parser.parse_args(argv)
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        raise UsageError(f"--families {unknown[0]} is unknown; known are {', '.join(FAMILIES)}")
    families = [family for name in options.families for family in FAMILIES[name]]
    for ranks in options.ranks:
        mp.spawn(work, (ranks, families, options.repeats, options.port), nprocs=ranks)


if __name__ == "__main__":
    run_command(main)
