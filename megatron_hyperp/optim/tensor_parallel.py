"""Newton-Schulz of matrices that are sharded over tensor-parallel ranks.

Every strategy is exact: up to rounding, each rank gets its shard of what one rank would compute from whole matrices.
Shards form families (equal shape, one partition dimension) and each family is one batch, in communication too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_hyperp.optim.orthogonalize import newton_schulz
from megatron_hyperp.parameters import REPLICATED

NewtonSchulz = Callable[[torch.Tensor], torch.Tensor]


def orthogonalize_sharded(
    shards: Sequence[torch.Tensor],
    *,
    group: dist.ProcessGroup,
    partition_dim: int,
    strategy: str = "gather",
    ns_steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Orthogonalize matrices of which each rank of ``group`` holds an equal shard.

    Args:
        shards: this rank's shards, all of one shape [rows, columns], in the same order on every rank.
        group: the ranks that share the matrices.
        partition_dim: the dimension that is split, 0 or 1; -1 if every rank holds whole matrices.
        strategy: a key of :data:`STRATEGIES`.
        ns_steps: Newton-Schulz steps.
        coefficients: "quintic" or "polar_express".
        dtype: precision of Newton-Schulz.

    Returns:
        This rank's shards of the orthogonalized matrices, in order.

    Raises:
        ValueError: shapes differ, or the partition dimension or strategy is unknown.
    """
    if len({shard.shape for shard in shards}) > 1 or any(shard.ndim != 2 for shard in shards):
        raise ValueError(f"shards must be matrices of one shape, got {sorted({tuple(s.shape) for s in shards})}")
    if not shards:
        return []

    def iterate(batch: torch.Tensor) -> torch.Tensor:
        return newton_schulz(batch, steps=ns_steps, coefficients=coefficients, dtype=dtype)

    family = torch.stack(list(shards))
    return list(orthogonalize_family(family, iterate, group=group, partition_dim=partition_dim, strategy=strategy))


def orthogonalize_family(
    family: torch.Tensor,
    iterate: NewtonSchulz,
    *,
    group: dist.ProcessGroup | None,
    partition_dim: int,
    strategy: str = "gather",
) -> torch.Tensor:
    """Orthogonalize a [count, rows, columns] stack of shards; ``iterate`` does so for whole matrices.

    Raises:
        ValueError: the partition dimension or strategy is unknown.
    """
    if partition_dim not in (REPLICATED, 0, 1):
        raise ValueError(f"partition_dim is {partition_dim}; it must be 0, 1 or {REPLICATED} (replicated)")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; known are {', '.join(STRATEGIES)}")
    if partition_dim == REPLICATED or group is None or group.size() == 1:
        return iterate(family)
    return STRATEGIES[strategy](family, iterate, group, partition_dim)


def _gather(family: torch.Tensor, iterate: NewtonSchulz, group: dist.ProcessGroup, partition_dim: int) -> torch.Tensor:
    """All-gather the shards; every rank orthogonalizes every matrix and keeps its shard."""
    ranks = group.size()
    gathered = family.new_empty((ranks * family.shape[0], *family.shape[1:]))
    dist.all_gather_into_tensor(gathered, family.contiguous(), group=group)
    whole = torch.cat(gathered.chunk(ranks), dim=partition_dim + 1)
    return iterate(whole).chunk(ranks, dim=partition_dim + 1)[group.rank()].contiguous()


STRATEGIES: dict[str, Callable[[torch.Tensor, NewtonSchulz, dist.ProcessGroup, int], torch.Tensor]] = {
    "gather": _gather,
}
