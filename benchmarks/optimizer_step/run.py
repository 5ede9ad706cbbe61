"""Time Newton-Schulz over tensor-parallel ranks, or a whole optimizer step: ours beside what others do, in one run.

Each family is orthogonalized by every strategy and by two baselines written the way other codebases do it: all-gather
and redundant Newton-Schulz, matrix by matrix; and one Gram all-reduce per iteration and matrix (``others.py``). AdamW
on the same shards shows the scale. Medians over repetitions; every ratio is within the run.

``--whole-step`` does so for whole steps of tensor- and data-parallel ranks: see ``whole_step.py``.

``--gpu`` times Newton-Schulz alone, of full-size matrices on one GPU, in each form and backend, beside a plain matmul.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.optimizer_step.measuring import WARM_UPS, run_ranks, seconds, slowest
from benchmarks.optimizer_step.others import all_reduce_per_iteration, redundant_per_matrix
from benchmarks.optimizer_step.slices import SLICES
from benchmarks.optimizer_step.whole_step import run as run_whole_steps
from benchmarks.turns import in_turns
from megatron_hyperp import device
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.products import BACKENDS, check_backend
from megatron_hyperp.optim.tensor_parallel import STRATEGIES, Job, choose, costs, machine, orthogonalize_family

# (count, rows, columns, sharded dimension) of families. "design" is the shape of the claims; the others are layers
# or experts of the paper's models at a quarter of the width: fused QKV, attention projection, gate and up, down.
FAMILIES = {
    "design": [(8, 2048, 512, 0)],
    "d8": [(8, 768, 256, 0), (8, 256, 512, 1), (8, 2048, 256, 0), (8, 256, 1024, 1)],
    "d24": [(4, 1792, 768, 0), (4, 768, 1536, 1), (4, 6144, 768, 0), (4, 768, 3072, 1)],
    "moe-d8": [(64, 256, 256, 0), (64, 256, 128, 1)],
    "moe-d24": [(16, 768, 768, 0), (16, 768, 384, 1)],
    "odd": [(3, 1024, 256, 0), (1, 2048, 512, 0), (5, 256, 1024, 0), (4, 256, 256, -1)],
}
Family = tuple[int, int, int, int]

# (count, rows, columns) of the paper's models at full width, in the order above. Counts are what one GPU may own: eight
# layers, or the 64 experts (sparsity 8, granularity 8) of one layer.
GPU_FAMILIES = {
    "d8": [(8, 3072, 1024), (8, 1024, 2048), (8, 8192, 1024), (8, 1024, 4096)],
    "d24": [(8, 7168, 3072), (8, 3072, 6144), (8, 24576, 3072), (8, 3072, 12288)],
    "moe-d8": [(64, 1024, 1024), (64, 1024, 512)],
    "moe-d24": [(64, 3072, 3072), (64, 3072, 1536)],
}
# Side of the plain matmul: large enough to run at the device's best rate.
MATMUL_SIZE = 8192


def adamw(shards: torch.Tensor) -> torch.Tensor:
    """One fused-by-foreach AdamW step on the same elements."""
    weight = torch.nn.Parameter(torch.zeros_like(shards))
    weight.grad = shards
    torch.optim.AdamW([weight], foreach=True).step()
    return weight


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
    if split >= 0:
        methods["redundant"] = lambda: redundant_per_matrix(shards, split, group)
        methods["all-reduce"] = lambda: all_reduce_per_iteration(shards, split, group)
    methods["AdamW"] = lambda: adamw(shards)
    timed = {name: slowest(partial(_alone, method)) for name, method in methods.items()}
    return {name: value for name, (value,) in in_turns(timed, repeats, warm_ups=WARM_UPS).items()}


def _alone(method: Callable[[], object]) -> list[float]:
    return [seconds(method)]


def report(family: Family, spent: dict[str, float], ranks: int) -> str:
    """Return one family's block of the table."""
    count, rows, columns, split = family
    ns, job = NewtonSchulz(dtype=torch.float32), Job(count, rows, columns, split, ranks)
    predicted, rates = costs(job, ns), machine()
    best = min(spent[name] for name in STRATEGIES if name in spent)
    lines = [f"{count} x [{rows}, {columns}], dim {split}, {ranks} ranks: auto takes {choose(job, ns, rates)}"]
    for name, value in spent.items():
        line = f"  {name:11s} {value / best:6.2f} x best  {1e3 * value:9.2f} ms"
        if name in predicted:
            cost = predicted[name]
            line += f"  predicted {1e3 * cost.seconds(rates):9.2f} ms  {cost.collectives} collectives"
            line += f"  {cost.sent / 1e6:8.2f} MB  {cost.flops / 1e9:8.2f} GFLOP a rank"
        lines.append(line)
    return "\n".join(lines)


def work(families: list[Family], repeats: int) -> None:
    """Measure the families; run by every rank."""
    group = dist.group.WORLD
    assert group is not None
    for family in families:
        spent = measure(family, repeats, group)
        if group.rank() == 0:
            print(report(family, spent, group.size()), flush=True)


def gpu_methods() -> dict[str, NewtonSchulz]:
    """Return standard bf16 and Gram fp16 on each backend; say which backend cannot run."""
    methods = {}
    for backend in BACKENDS:
        try:
            check_backend(backend, torch.bfloat16)
        except UsageError as error:
            print(f"left out: {error}")
            continue
        methods[f"standard bf16 {backend}"] = NewtonSchulz(dtype=torch.bfloat16, form="standard", backend=backend)
        methods[f"gram fp16 {backend}"] = NewtonSchulz(dtype=torch.float16, form="gram", backend=backend)
    return methods


def gpu_milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the GPU; calls are queued without waiting, so launching one overlaps the one before."""
    for _ in range(WARM_UPS):
        function()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(marks))


def gpu_report(family: tuple[int, int, int], methods: dict[str, NewtonSchulz], repeats: int) -> str:
    """Return one family's block of the table: fp32 in and out, casts and normalization timed but not counted as FLOPs.

    The plain matmul is timed with each family, since a GPU's clock falls as it warms up.
    """
    count, rows, columns = family
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device.device())
    plain = 2 * MATMUL_SIZE**3 / gpu_milliseconds(lambda: left @ right, repeats) / 1e9
    lines = [f"{count} x [{rows}, {columns}]: a plain bf16 matmul of {MATMUL_SIZE} squared runs at {plain:.1f} TFLOP/s"]
    x = torch.randn(count, rows, columns, device=device.device())
    spent = {name: gpu_milliseconds(partial(ns, x), repeats) for name, ns in methods.items()}
    first, *_ = spent
    for name, ns in methods.items():
        rate = count * ns.flops(rows, columns, ns.form) / spent[name] / 1e9
        lines.append(
            f"  {name:20s} {spent[name]:9.3f} ms  {rate:7.1f} TFLOP/s, {rate / plain:5.2f} of the matmul's"
            f"  {spent[first] / spent[name]:5.2f} x as fast as {first}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description="Time Newton-Schulz, its strategies over tensor-parallel ranks or its forms and backends on one"
        " GPU; or whole optimizer steps."
    )
    what = result.add_mutually_exclusive_group()
    what.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="tensor-parallel sizes [2 4]")
    what.add_argument("--gpu", action="store_true", help="time forms and backends on one GPU instead")
    what.add_argument("--whole-step", action="store_true", help="time whole steps of --tp x --dp ranks instead")
    names = f"of {', '.join(FAMILIES)} [design]; with --gpu of {', '.join(GPU_FAMILIES)} [all]"
    result.add_argument("--families", nargs="+", help=names)
    slices = f"with --whole-step: of {', '.join(SLICES)} [d8 moe-d8]"
    result.add_argument("--models", nargs="+", default=["d8", "moe-d8"], help=slices)
    result.add_argument("--tp", type=int, default=2, help="with --whole-step: tensor-parallel ranks [2]")
    result.add_argument("--dp", type=int, default=2, help="with --whole-step: data-parallel ranks [2]")
    result.add_argument("--repeats", type=int, default=5, help="repetitions of which the median counts [5]")
    result.add_argument("--port", default="29577", help="TCP port for the ranks [29577]")
    return result


def main(argv: list[str]) -> None:
    """Measure what is asked for."""
    options = parser().parse_args(argv)
    if options.whole_step:
        run_whole_steps(options.models, options.tp, options.dp, options.repeats, options.port)
        return
    if options.gpu and not device.has_cuda():
        raise UsageError("--gpu needs a CUDA device, and there is none here; leave it out to time the ranks on CPU")
    known = list(GPU_FAMILIES if options.gpu else FAMILIES)
    chosen = options.families or (known if options.gpu else ["design"])
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UsageError(f"--families {unknown[0]} is unknown; known are {', '.join(known)}")
    if options.gpu:
        print(f"{device.describe()}; torch {torch.__version__}")
        methods = gpu_methods()
        for family in (family for name in chosen for family in GPU_FAMILIES[name]):
            print(gpu_report(family, methods, options.repeats), flush=True)
        return
    families = [family for name in chosen for family in FAMILIES[name]]
    for ranks in options.ranks:
        run_ranks(work, ranks, options.port, families, options.repeats)


if __name__ == "__main__":
    run_command(main)
