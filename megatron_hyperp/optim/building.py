"""From wrapped chunks of a model to their optimizer: rules, owners, buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_hyperp.numerics.fp8 import WeightScale
from megatron_hyperp.optim.buckets import Share
from megatron_hyperp.optim.data_parallel import Exchange
from megatron_hyperp.optim.distributed import HyperPOptimizer
from megatron_hyperp.optim.domains import Domain, domains_of
from megatron_hyperp.optim.groups import Groups
from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.routing import Heads, describe, route
from megatron_hyperp.parameters import named_parameters


def build_optimizer(
    model_chunks: Sequence[torch.nn.Module],
    options: HyperPConfig,
    *,
    exchange: Exchange,
    groups: Groups | None = None,
    heads: Heads | None = None,
    scales: Mapping[torch.nn.Parameter, WeightScale] | None = None,
    bucket_size: int | None = None,
    log: Callable[[str], None] | None = None,
) -> HyperPOptimizer:
    """Build the optimizer of this rank's pipeline chunks; Megatron-Core's process groups must exist.

    Args:
        model_chunks: of the model on this rank; their weights and, where the exchange reduces them, gradients are
            ordered by owner here.
        options: how to update the model.
        exchange: what moves gradients and weights, not laid out yet.
        groups: process groups; None: those of Megatron-Core's parallel state.
        heads: layout of QKV weights; needed unless ``options.matrix_split`` is "fused".
        scales: of the weights that are gathered in FP8.
        bucket_size: elements from which on a bucket is closed; None: one bucket, or with overlap as large ones as
            Megatron-Core's.
        log: receives the routing table, the balance of ownership and how Newton-Schulz is shared.

    Raises:
        ValueError: see :func:`~megatron_hyperp.optim.routing.route`; or nothing is trainable.
    """
    groups = groups or Groups.of()
    routes = route(
        [pair for chunk in model_chunks for pair in named_parameters(chunk)],
        options,
        tensor_parallel_size=groups.tensor.size(),
        expert_tensor_parallel_size=groups.expert_tensor.size(),
        heads=heads,
    )
    if not routes:
        raise ValueError("no parameter of the model requires a gradient; unfreeze some")
    domains = domains_of(routes, options.ns_strategy, groups)
    _lay_out(exchange, model_chunks, domains, bucket_size, scales or {})
    optimizer = HyperPOptimizer(domains, options, exchange=exchange)
    if log is not None:
        log(describe(routes))
        log(optimizer.describe())
    return optimizer


def _lay_out(
    exchange: Exchange,
    chunks: Sequence[torch.nn.Module],
    domains: Sequence[Domain],
    bucket_size: int | None,
    scales: Mapping[torch.nn.Parameter, WeightScale],
) -> None:
    """Order the chunks' gradients and weights by owner."""
    shares: dict[torch.nn.Parameter, list[Share]] = {}
    group_of: dict[torch.nn.Parameter, dist.ProcessGroup] = {}
    for domain in domains:
        for piece in domain.plan.pieces:
            parameter = domain.routes[piece.route].parameter
            shares.setdefault(parameter, []).append(Share(piece.rank, piece.block))
            group_of[parameter] = domain.data
    # The backward pass finishes the last chunk first.
    backward_order = [
        parameter
        for chunk in reversed(chunks)
        for parameter in reversed(list(chunk.parameters()))
        if parameter in shares
    ]
    if bucket_size is None and exchange.overlap_grad_reduce:
        # Without overlap one bucket is best; with it, as large as Megatron-Core's.
        bucket_size = max(40_000_000, 1_000_000 * domains[0].data.size())
    # What has no replicas does not travel.
    travelling = {parameter: scale for parameter, scale in scales.items() if group_of[parameter].size() > 1}
    exchange.lay_out(backward_order, shares, group_of.__getitem__, bucket_size, travelling)
