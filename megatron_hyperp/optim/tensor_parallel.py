"""Newton-Schulz of matrices that are sharded over tensor-parallel ranks.

Three strategies, all exact: up to rounding, each rank gets its shard of what one rank would compute from whole
matrices. Matrices of one shape form a family and are one batch, in communication too, so the number of collectives
does not depend on the number of matrices.

* ``gather``: all-gather the shards; every rank orthogonalizes every matrix.
* ``all_to_all``: each rank gets some of the matrices whole, orthogonalizes those, and sends the shards back.
* ``gram``: shards form partial Gram matrices, which are reduce-scattered so that each rank owns some of them, iterates
  those alone, and all-gathers the resulting polynomials; the long products with X stay local. One all-reduce of a
  number per matrix, its largest element, keeps those sums of squares in range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from megatron_hyperp import device
from megatron_hyperp.optim.magnitudes import largest_elements, power_of_two
from megatron_hyperp.optim.orthogonalize import SMALLEST_NORM, NewtonSchulz
from megatron_hyperp.optim.products import gram_polynomial, symmetric_product
from megatron_hyperp.parameters import REPLICATED
from megatron_hyperp.text import aligned

AUTO = "auto"


def orthogonalize_sharded(
    shards: Sequence[torch.Tensor],
    *,
    group: dist.ProcessGroup,
    partition_dim: int,
    strategy: str = AUTO,
    ns_steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Orthogonalize matrices of which each rank of ``group`` holds an equal shard.

    Args:
        shards: this rank's shards, all of one shape [rows, columns], in the same order on every rank.
        group: the ranks that share the matrices.
        partition_dim: the dimension that is split, 0 or 1; -1 if every rank holds whole matrices.
        strategy: a key of :data:`STRATEGIES`, or "auto" for the cheapest by :func:`choose`.
        ns_steps: Newton-Schulz steps.
        coefficients: a key of :data:`~megatron_hyperp.coefficients.SETS`.
        dtype: precision of Newton-Schulz.

    Returns:
        This rank's shards of the orthogonalized matrices, in order.

    Raises:
        ValueError: shapes differ, or the partition dimension, strategy or schedule is unknown.
    """
    if len({shard.shape for shard in shards}) > 1 or any(shard.ndim != 2 for shard in shards):
        raise ValueError(f"shards must be matrices of one shape, got {sorted({tuple(s.shape) for s in shards})}")
    newton_schulz = NewtonSchulz(steps=ns_steps, coefficients=coefficients, dtype=dtype)
    _check(partition_dim, strategy)
    if not shards:
        return []
    family = torch.stack(list(shards))
    return list(
        orthogonalize_family(family, newton_schulz, group=group, partition_dim=partition_dim, strategy=strategy)
    )


def orthogonalize_family(
    family: torch.Tensor,
    newton_schulz: NewtonSchulz,
    *,
    group: dist.ProcessGroup,
    partition_dim: int,
    strategy: str = AUTO,
) -> torch.Tensor:
    """Orthogonalize a [count, rows, columns] stack of shards; a collective call.

    Raises:
        ValueError: the partition dimension or strategy is unknown, or gram is asked for in bf16.
    """
    _check(partition_dim, strategy)
    ranks = group.size()
    if ranks == 1:
        return newton_schulz(family)
    if strategy == AUTO:
        shape = [size * ranks if dim == partition_dim else size for dim, size in enumerate(family.shape[1:])]
        job = Job(len(family), shape[0], shape[1], partition_dim, ranks)
        strategy = choose(job, newton_schulz, machine())
    if strategy == "gram" and newton_schulz.dtype == torch.bfloat16:
        raise ValueError("the gram strategy loses accuracy in bf16; use fp16 or fp32, or another strategy")
    if partition_dim == REPLICATED:
        return newton_schulz(family) if strategy == "gather" else _share(family, newton_schulz, group)
    return STRATEGIES[strategy](family, newton_schulz, group, partition_dim)


def _check(partition_dim: int, strategy: str) -> None:
    if partition_dim not in (REPLICATED, 0, 1):
        raise ValueError(f"partition_dim is {partition_dim}; it must be 0, 1 or {REPLICATED} (replicated)")
    if strategy != AUTO and strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; known are {AUTO}, {', '.join(STRATEGIES)}")


def _gather(
    family: torch.Tensor, newton_schulz: NewtonSchulz, group: dist.ProcessGroup, partition_dim: int
) -> torch.Tensor:
    ranks, dim = group.size(), partition_dim + 1
    whole = torch.cat(_all_gather(family, group).chunk(ranks), dim=dim)
    return newton_schulz(whole).chunk(ranks, dim=dim)[group.rank()].contiguous()


def _share(family: torch.Tensor, newton_schulz: NewtonSchulz, group: dist.ProcessGroup) -> torch.Tensor:
    """Orthogonalize matrices that every rank holds whole: each rank does its part and all-gathers."""
    mine = _padded(family, group.size()).chunk(group.size())[group.rank()]
    return _all_gather(newton_schulz(mine), group)[: len(family)]


def _all_to_all(
    family: torch.Tensor, newton_schulz: NewtonSchulz, group: dist.ProcessGroup, partition_dim: int
) -> torch.Tensor:
    ranks, dim = group.size(), partition_dim + 1
    received = _exchange(_padded(family, ranks), group)
    mine = newton_schulz(torch.cat(received.chunk(ranks), dim=dim))
    returned = _exchange(torch.cat(mine.chunk(ranks, dim=dim)), group)
    return returned[: len(family)]


def _gram(
    family: torch.Tensor, newton_schulz: NewtonSchulz, group: dist.ProcessGroup, partition_dim: int
) -> torch.Tensor:
    count, ranks, other = len(family), group.size(), 1 - partition_dim
    if family.shape[partition_dim + 1] * ranks < family.shape[other + 1]:
        # Sharded along the short side: an exchange each way makes it the long one.
        if family.shape[other + 1] % ranks:
            raise ValueError(
                f"{ranks} ranks do not divide the long side {family.shape[other + 1]} of matrices sharded along the"
                " short one; use all_to_all"
            )
        swapped = _reshard(family, group, partition_dim, other)
        return _reshard(_gram(swapped, newton_schulz, group, other), group, other, partition_dim)
    # X with its rows whole and its columns, the long side, sharded.
    x = family.mT if partition_dim == 0 else family
    dtype = newton_schulz.dtype
    largest = largest_elements(x)
    own = power_of_two(largest)
    x = x * own
    # In half precision X is kept near norm 1, while Gram matrices travel in the family's precision.
    scale = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(SMALLEST_NORM)
    x = x.div_(scale).to(dtype)
    # Partial Gram matrices are sums of squares: all ranks scale theirs by the power of two of the whole matrix. What a
    # rank holds may be so much smaller than the rest that its part is 0.
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scale.mul_(power_of_two(largest) / own)
    for number, segment in enumerate(newton_schulz.segments):
        first = number == 0
        partial = symmetric_product(x, x.mT, backend=newton_schulz.backend).to(family.dtype)
        mine = _reduce_scatter(_padded(partial * scale.square() if first else partial, ranks), group)
        norm: torch.Tensor | float = 1.0
        if first:
            # ||X||^2 is the trace of X X^T, so the norm costs no collective of its own.
            squares = mine.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
            norm = newton_schulz.norm_margin * squares.sqrt().clamp_min(SMALLEST_NORM)
        polynomial = gram_polynomial((mine / norm / norm).to(dtype), segment, backend=newton_schulz.backend)
        polynomial = polynomial.to(family.dtype) / norm
        polynomial = _all_gather(polynomial, group)[:count]
        x = (polynomial * scale if first else polynomial).to(dtype) @ x
    x = x.to(family.dtype)
    return x.mT.contiguous() if partition_dim == 0 else x


STRATEGIES: dict[str, Callable[[torch.Tensor, NewtonSchulz, dist.ProcessGroup, int], torch.Tensor]] = {
    "gather": _gather,
    "all_to_all": _all_to_all,
    "gram": _gram,
}


def _padded(family: torch.Tensor, ranks: int) -> torch.Tensor:
    """Append zero matrices until the count is a multiple of ``ranks``."""
    return pad(family, (0, 0, 0, 0, 0, -len(family) % ranks)).contiguous()


def _all_gather(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' [count, ...] along the first dimension."""
    whole = part.new_empty((group.size() * len(part), *part.shape[1:]))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum [ranks x count, ...] over the ranks and return this rank's [count, ...]."""
    part = whole.new_empty((len(whole) // group.size(), *whole.shape[1:]))
    dist.reduce_scatter_tensor(part, whole, group=group)
    return part


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send the j-th of equal parts of the first dimension to rank j; return what came, in rank order."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def _reshard(family: torch.Tensor, group: dist.ProcessGroup, source: int, target: int) -> torch.Tensor:
    """Turn shards along the matrix dimension ``source`` into shards along ``target``."""
    parts = torch.cat(family.chunk(group.size(), dim=target + 1))
    return torch.cat(_exchange(parts, group).chunk(group.size()), dim=source + 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank can do, for the cost model.

    Attributes:
        flops: matmul FLOP/s of one rank.
        bytes_per_s: bytes per second that one rank sends.
        latency: seconds that a collective takes however small it is.
        copy_bytes_per_s: bytes per second of local copies.
    """

    flops: float
    bytes_per_s: float
    latency: float
    copy_bytes_per_s: float


# Effective rates. CPU: one core of a two-core machine, gloo on loopback, fitted to benchmarks/optimizer_step. CUDA:
# guesses from data sheets (H100 SXM, NVLink) until measured.
MACHINES = {
    "cpu": Machine(flops=90e9, bytes_per_s=0.5e9, latency=1.2e-3, copy_bytes_per_s=8e9),
    "cuda": Machine(flops=300e12, bytes_per_s=200e9, latency=3e-5, copy_bytes_per_s=1.5e12),
}


def machine() -> Machine:
    """Return the rates of the kind of device that costs are counted for."""
    return MACHINES[device.target()]


@dataclass(frozen=True, slots=True)
class Job:
    """A family to orthogonalize.

    Attributes:
        count: matrices L.
        rows: global rows.
        columns: global columns.
        partition_dim: the sharded dimension, or -1.
        ranks: tensor-parallel ranks p.
    """

    count: int
    rows: int
    columns: int
    partition_dim: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one rank spends on a family: FLOPs, bytes sent, bytes copied locally, collectives."""

    flops: float
    sent: float
    copied: float
    collectives: int

    def seconds(self, rates: Machine) -> float:
        """Predicted time, nothing overlapped."""
        return (
            self.flops / rates.flops
            + self.sent / rates.bytes_per_s
            + self.copied / rates.copy_bytes_per_s
            + self.collectives * rates.latency
        )


def costs(job: Job, newton_schulz: NewtonSchulz, *, itemsize: int = 4) -> dict[str, Cost]:
    """Return what each strategy that can serve the job costs one rank; ``itemsize`` is bytes per element sent."""
    n, m = sorted((job.rows, job.columns))
    p, size = job.ranks, float(itemsize * job.rows * job.columns)
    share = math.ceil(job.count / p)
    whole = float(newton_schulz.flops(n, m, newton_schulz.form_of(n, m)))
    if p == 1:
        return {"gather": Cost(job.count * whole, 0.0, 0.0, 0)}
    others = (p - 1) / p
    if job.partition_dim == REPLICATED:
        return {
            "gather": Cost(job.count * whole, 0.0, 0.0, 0),
            "all_to_all": Cost(share * whole, share * size * (p - 1), 2 * job.count * size, 1),
        }
    result = {
        "gather": Cost(job.count * whole, job.count * size * others, 3 * job.count * size, 1),
        "all_to_all": Cost(share * whole, 2 * share * size * others, 6 * share * size, 2),
    }
    short = job.partition_dim == (0 if job.rows < job.columns else 1) and job.rows != job.columns
    if newton_schulz.dtype == torch.bfloat16 or newton_schulz.form == "standard" or (short and m % p):
        return result
    segments, square = newton_schulz.segments, float(itemsize * n * n)
    # What does not depend on m is the iteration on Gram matrices, each at its owner; the rest is local on every rank.
    polynomials = newton_schulz.polynomial_flops(n)
    flops = job.count * (newton_schulz.flops(n, m, "gram") - polynomials) / p + share * polynomials
    # And the largest element of each matrix, from all ranks to all.
    sent = (2 * len(segments) * share * p * square + 2 * job.count * itemsize) * others
    copied = len(segments) * (4 * job.count * square + 3 * job.count * size / p)
    if short:
        sent += 2 * job.count * size / p * others
        copied += 4 * job.count * size / p
    result["gram"] = Cost(flops, sent, copied, 2 * len(segments) + 1 + (2 if short else 0))
    return result


def choose(job: Job, newton_schulz: NewtonSchulz, rates: Machine) -> str:
    """Return the strategy that the cost model predicts to be fastest."""
    predicted = costs(job, newton_schulz)
    return min(predicted, key=lambda strategy: predicted[strategy].seconds(rates))


def taken(job: Job, newton_schulz: NewtonSchulz, rates: Machine, strategy: str) -> str:
    """Return the strategy that a job gets: the one asked for, or the fastest under AUTO or where that cannot serve."""
    return strategy if strategy in costs(job, newton_schulz) else choose(job, newton_schulz, rates)


def predicted_seconds(job: Job, newton_schulz: NewtonSchulz, rates: Machine, strategy: str = AUTO) -> float:
    """Return the predicted time of a job under the strategy that it gets."""
    return costs(job, newton_schulz)[taken(job, newton_schulz, rates, strategy)].seconds(rates)


def describe(jobs: Sequence[Job], newton_schulz: NewtonSchulz, rates: Machine, strategy: str) -> str:
    """Return a table: for each family the strategy taken, and the predicted milliseconds of each."""
    rows = [("matrices", "split", "form", "strategy", *(f"{name} ms" for name in STRATEGIES))]
    for job in jobs:
        predicted = costs(job, newton_schulz)
        used = choose(job, newton_schulz, rates) if strategy == AUTO else strategy
        split = {REPLICATED: "-", 0: "rows", 1: "columns"}[job.partition_dim]
        times = [f"{1e3 * predicted[name].seconds(rates):.2f}" if name in predicted else "-" for name in STRATEGIES]
        form = newton_schulz.form_of(job.rows, job.columns)
        rows.append((f"{job.count} of {job.rows} x {job.columns}", split, form, used, *times))
    return "\n".join(aligned(rows))
