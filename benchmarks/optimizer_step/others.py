"""How others do it: each matrix by itself, and every data-parallel rank everything.

Two ways to orthogonalize a sharded matrix: all-gather it and run the iteration on every rank, or all-reduce its Gram
matrix in each iteration. Around either a whole step: gradients are all-reduced over the data-parallel ranks, all of
which keep all weights and state and take the same step, so no weights travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap

import torch
import torch.distributed as dist

from benchmarks.optimizer_step.measuring import Clock
from megatron_hyperp.config import OptimizerConfig
from megatron_hyperp.optim import sphere
from megatron_hyperp.optim.orthogonalize import coefficient_schedule
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.rules.adam import adam_direction_
from megatron_hyperp.optim.rules.muon import momentum_
from megatron_hyperp.optim.tensor_parallel import Cost
from megatron_hyperp.parameters import REPLICATED

STEPS = 5


def redundant_per_matrix(shards: torch.Tensor, split: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather one matrix after the other; every rank runs the standard iteration on each."""
    results = []
    for shard in shards:
        whole = _gathered(shard, split, group)
        x = whole.mT if whole.shape[0] > whole.shape[1] else whole
        x = x / x.norm()
        for a, b, c in coefficient_schedule("quintic", STEPS):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        whole = x.mT if whole.shape[0] > whole.shape[1] else x
        results.append(whole if split == REPLICATED else whole.chunk(group.size(), dim=split)[group.rank()])
    return torch.stack(results)


def _gathered(shard: torch.Tensor, split: int, group: dist.ProcessGroup) -> torch.Tensor:
    if split == REPLICATED or group.size() == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard, group=group)
    return torch.cat(parts, dim=split)


def all_reduce_per_iteration(shards: torch.Tensor, split: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All-reduce the Gram matrix of one matrix in each iteration; the side that is not sharded makes it."""
    results = []
    for shard in shards:
        x = shard.mT if split == 0 else shard
        square = x.square().sum()
        dist.all_reduce(square, group=group)
        x = x / square.sqrt()
        for a, b, c in coefficient_schedule("quintic", STEPS):
            gram = x @ x.mT
            dist.all_reduce(gram, group=group)
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        results.append(x.mT if split == 0 else x)
    return torch.stack(results)


def cost_of_redundant(rows: int, columns: int, split: int, ranks: int) -> Cost:
    """Return what :func:`redundant_per_matrix` costs a rank for one fp32 matrix."""
    n, m = sorted((rows, columns))
    sharded = split != REPLICATED and ranks > 1
    size = 4.0 * rows * columns if sharded else 0.0
    return Cost(STEPS * (4.0 * n * n * m + 2.0 * n**3), size * (ranks - 1) / ranks, 3 * size, int(sharded))


def cost_of_all_reduce(rows: int, columns: int, split: int, ranks: int) -> Cost:
    """Return what :func:`all_reduce_per_iteration` costs a rank for one fp32 matrix."""
    if split == REPLICATED:
        return cost_of_redundant(rows, columns, split, ranks)
    whole, sharded = (columns, rows) if split == 0 else (rows, columns)
    flops = STEPS * (4.0 * whole**2 * sharded / ranks + 2.0 * whole**3)
    return Cost(flops, STEPS * 2 * 4.0 * whole**2 * (ranks - 1) / ranks, 0.0, STEPS + 1)


class Replicated:
    """A HyperP step as others would take it: nothing is sharded but the weights, over tensor-parallel ranks.

    Args:
        routes: of this rank's fp32 parameters; put on their spheres here.
        options: resolved optimizer config, with one learning rate for all of them.
        tensor: ranks that share the matrices.
        data: ranks that replicate them.
        orthogonalize: one of the functions above.
        clock: gets the seconds of "newton-schulz" and "exchange".
    """

    def __init__(
        self,
        routes: Sequence[Route],
        options: OptimizerConfig,
        *,
        tensor: dist.ProcessGroup,
        data: dist.ProcessGroup,
        orthogonalize: Callable[[torch.Tensor, int, dist.ProcessGroup], torch.Tensor],
        clock: Clock,
    ) -> None:
        assert options.lr is not None
        self.routes, self.options, self.lr = list(routes), options, options.lr
        self.tensor, self.data = tensor, data
        self.steps_taken = 0
        self._orthogonalize = clock.around("newton-schulz", orthogonalize)
        self._reduce = clock.around("exchange", self._reduce_gradients)
        self._buffer = torch.zeros(sum(entry.parameter.numel() for entry in routes))
        pieces = self._buffer.split([entry.parameter.numel() for entry in routes])
        self.gradients = [piece.view(entry.block.shape) for piece, entry in zip(pieces, routes, strict=True)]
        moments = [1 if entry.rule.needs_matrix else 2 for entry in routes]
        self.state = [
            [torch.zeros_like(gradient) for _ in range(count)]
            for gradient, count in zip(self.gradients, moments, strict=True)
        ]
        for entry, gradient in zip(routes, self.gradients, strict=True):
            if entry.radius is not None:
                self._move_on_sphere(entry, gradient, lr=0.0)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with this rank's own gradients in ``gradients``."""
        self._reduce()
        norm = self._global_norm()
        if norm > self.options.clip_grad:
            self._buffer.mul_(self.options.clip_grad / norm)
        self.steps_taken += 1
        for entry, gradient, state in zip(self.routes, self.gradients, self.state, strict=True):
            direction = self._direction(entry, gradient, state)
            if entry.radius is not None:
                self._move_on_sphere(entry, direction, lr=self.lr)
            else:
                weight = entry.parameter.detach()
                weight.sub_(direction.view(weight.shape), alpha=self.lr)

    def _reduce_gradients(self) -> None:
        if self.data.size() > 1:
            dist.all_reduce(self._buffer, group=self.data)
        self._buffer.mul_(1.0 / self.data.size())

    def _global_norm(self) -> float:
        """Return the norm of all gradients; of tensor-parallel ranks' equal copies the first counts."""
        first = self.tensor.rank() == 0
        pairs = zip(self.routes, self.gradients, strict=True)
        own = [gradient for entry, gradient in pairs if first or entry.partition_dim != REPLICATED]
        square = torch.nn.utils.get_total_norm(own).square()
        if self.tensor.size() > 1:
            dist.all_reduce(square, group=self.tensor)
        return float(square.sqrt())

    def _direction(self, entry: Route, gradient: torch.Tensor, state: Sequence[torch.Tensor]) -> torch.Tensor:
        options = self.options
        if entry.rule.needs_matrix:
            [momenta] = state
            update = momentum_(momenta, gradient, momentum=options.muon_momentum, nesterov=options.muon_nesterov)
            # What every rank holds whole is not sharded.
            orthogonalize = redundant_per_matrix if entry.partition_dim == REPLICATED else self._orthogonalize
            return orthogonalize(update[None], entry.partition_dim, self.tensor)[0]
        first, second = state
        betas = (options.adam_beta1, options.adam_beta2)
        return adam_direction_(first, second, gradient, step=self.steps_taken, betas=betas, eps=options.adam_eps)

    @torch.no_grad()
    def _move_on_sphere(self, entry: Route, direction: torch.Tensor, lr: float) -> None:
        weights, directions = entry.parameter.detach()[None], direction[None]
        products = sphere.inner_products(weights, directions)
        if self.tensor.size() > 1 and entry.partition_dim != REPLICATED:
            dist.all_reduce(products, group=self.tensor)
        radii = torch.tensor([entry.radius], dtype=torch.float64)
        sphere.step_(weights, directions, products, radii=radii, lr=lr)

    def state_bytes(self) -> int:
        """Bytes of fp32 weights and optimizer state on this rank."""
        return sum(
            4 * gradient.numel() * (1 + len(state)) for gradient, state in zip(self.gradients, self.state, strict=True)
        )

    def costs(self, cost_of: Callable[[int, int, int, int], Cost]) -> list[Cost]:
        """Return what Newton-Schulz costs this rank, by matrix."""
        jobs = [
            (*entry.shape, entry.partition_dim, self.tensor.size()) for entry in self.routes if entry.rule.needs_matrix
        ]
        return list(starmap(cost_of, jobs))
