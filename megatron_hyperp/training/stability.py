"""Stability indicators of a step: does training stay bounded, and alike at every scale (arXiv 2603.28743)?

Z is the mean squared log-sum-exp of logits: of attention, of routers and of the output. RMS and outliers are of what
attention and MLP blocks add to the residual stream. They are taken from one micro-batch by forward hooks that are there
on observed steps alone; what the step does to the weights comes from the optimizer (``optim/observing.py``). Sums and
counts over all ranks make every figure that of one rank, provided that the sampled tokens are the same: the first
micro-batch of every data-parallel rank, micro-batch size x DP sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.optim.distributed import HyperPOptimizer
from megatron_hyperp.optim.observing import StepObserver
from megatron_hyperp.parameters import group_of, named_parameters, role_of

# Queries of a sequence, and positions of it, whose logits are looked at: evenly spaced, all of a shorter sequence.
SAMPLED_QUERIES = 64
SAMPLED_POSITIONS = 256
OUTLIER_SIGMAS = 5.0
BLOCKS = ("attention", "mlp")
# Rows of sums: numerator and denominator for each layer, and a last row for the output layer's logits.
_ATTENTION_Z = 0
_RMS = {"attention": 1, "mlp": 2}
_OUTLIERS = {"attention": 3, "mlp": 4}
_KINDS = 5


def attention_z(query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, int]:
    """Return the sum of squared log-sum-exps of causal attention logits over sampled queries, and their number.

    From queries and keys, for a fused kernel does not show its logits.

    Args:
        query: [sequence, batch, heads, head size].
        key: [sequence, batch, groups, head size]; each group serves the next heads / groups heads.
        scale: of the logits.
    """
    length, batch, heads, size = query.shape
    groups = key.shape[2]
    positions = sampled(length, SAMPLED_QUERIES, query.device)
    chosen = query[positions].float().view(len(positions), batch, groups, heads // groups, size)
    logits = scale * torch.einsum("qbghd,kbgd->bghqk", chosen, key.float())
    later = torch.arange(length, device=query.device) > positions[:, None]
    squares = torch.logsumexp(logits.masked_fill(later, -torch.inf), dim=-1).square()
    return squares.sum(dtype=torch.float64), squares.numel()


def sampled(length: int, number: int, home: torch.device) -> torch.Tensor:
    """Return so many evenly spaced positions of a sequence, the last among them; all if there are no more."""
    count = min(length, number)
    return length - 1 - (torch.arange(count, device=home) * length) // count


def output_z(logits: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, int]:
    """Return the sum of squared log-sum-exps over sampled positions, and their number; a collective call.

    Args:
        logits: [sequence, batch, vocabulary / ranks].
        group: tensor-parallel ranks, which share the vocabulary.
    """
    part = logits[sampled(len(logits), SAMPLED_POSITIONS, logits.device)].float()
    largest = part.amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (part - largest[..., None]).exp().sum(dim=-1)
    dist.all_reduce(total, group=group)
    squares = (largest + total.log()).square()
    return squares.sum(dtype=torch.float64), squares.numel()


def outliers(x: torch.Tensor) -> torch.Tensor:
    """Return how many elements are further than 5 sigma from the mean of their token; x is [..., hidden]."""
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return ((x - mean).square() > OUTLIER_SIGMAS**2 * variance).sum()


class Stability:
    """Watches steps.

    Args:
        config: resolved.
        chunks: of the model on this rank.
        optimizer: of the run.
        balance: loads of experts; None for a dense model.
    """

    def __init__(
        self,
        config: Config,
        chunks: Sequence[torch.nn.Module],
        optimizer: HyperPOptimizer,
        balance: Balance | None,
    ) -> None:
        assert config.model.residual_multiplier is not None
        assert config.model.softmax_scale is not None
        self._interval = config.logging.stability_interval
        self._layers = config.model.num_layers
        self._multiplier = config.model.residual_multiplier
        self._scale = config.model.softmax_scale
        self._chunks = list(chunks)
        self._optimizer = optimizer
        self._observer = StepObserver(self._layers, optimizer.families)
        self._balance = balance
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self._first = tensor_rank == 0
        # Without sequence parallelism tensor-parallel ranks have equal copies of what blocks put out.
        self._counts_blocks = self._first or config.parallel.sequence_parallel
        self._groups = self._present_groups()
        self._sums = torch.zeros(0)

    def _present_groups(self) -> list[str]:
        """Groups of parameters that the whole model has."""
        own = {
            group_of(name, role_of(name, parameter))
            for chunk in self._chunks
            for name, parameter in named_parameters(chunk)
        }
        everywhere: list[set[str]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, own)
        return sorted(set().union(*everywhere))

    def due(self, iteration: int) -> bool:
        """Whether the step that ends at this iteration is watched."""
        return bool(self._interval) and iteration % self._interval == 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch forward passes and the optimizer's step until the block ends."""
        self._sums = torch.zeros((self._layers + 1, _KINDS, 2), dtype=torch.float64, device=device.device())
        self._observer.clear()
        self._optimizer.observer = self._observer
        hooks = [hook for chunk in self._chunks for hook in self._hooks(chunk)]
        try:
            yield
        finally:
            self._optimizer.observer = None
            for hook in hooks:
                hook.remove()

    def _hooks(self, chunk: torch.nn.Module) -> Iterator[Any]:
        module: Any
        for module in chunk.modules():
            if hasattr(module, "self_attention") and hasattr(module, "mlp"):
                layer = module.layer_number - 1
                core = module.self_attention.core_attention
                yield core.register_forward_pre_hook(
                    _once(lambda _, inputs, at=layer: self._see_logits(at, *inputs[:2]))
                )
                for name, block in (("attention", module.self_attention), ("mlp", module.mlp)):
                    yield block.register_forward_hook(
                        _once(lambda _, __, output, at=layer, name=name: self._see_block(at, name, output[0]))
                    )
            if getattr(module, "post_process", False) and hasattr(module, "output_layer"):
                yield module.output_layer.register_forward_hook(
                    _once(lambda _, __, output: self._see_output(output[0]))
                )

    def _add(self, row: int, kind: int, numerator: torch.Tensor, denominator: int) -> None:
        self._sums[row, kind, 0] += numerator
        self._sums[row, kind, 1] += denominator

    def _see_logits(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        self._add(layer, _ATTENTION_Z, *attention_z(query, key, self._scale))

    def _see_block(self, layer: int, name: str, output: torch.Tensor) -> None:
        if self._counts_blocks:
            x = self._multiplier * output.float()
            self._add(layer, _RMS[name], x.square().sum(dtype=torch.float64), x.numel())
            self._add(layer, _OUTLIERS[name], outliers(x), x.numel())

    def _see_output(self, logits: torch.Tensor) -> None:
        total, count = output_z(logits, parallel_state.get_tensor_model_parallel_group())
        if self._first:
            self._add(self._layers, _ATTENTION_Z, total, count)

    def collect(self) -> dict[str, Any]:
        """Return the figures of the watched step; a collective call, equal on all ranks."""
        world = dist.group.WORLD
        assert world is not None
        dist.all_reduce(self._sums, group=world)
        self._observer.reduce(world)
        means = self._sums[..., 0] / self._sums[..., 1].clamp_min(1.0)
        row: dict[str, Any] = {"output_z": float(means[-1, _ATTENTION_Z])}
        layers = means[:-1]
        row.update(_both("attention_z", layers[:, _ATTENTION_Z]))
        for name in BLOCKS:
            row.update(_both(f"{name}_rms", layers[:, _RMS[name]].sqrt()))
            row.update(_both(f"{name}_outliers", layers[:, _OUTLIERS[name]]))
        if self._balance is not None:
            row.update(_both("router_z", self._balance.router_z))
            row["max_vio"] = float(self._balance.max_violation().max())
            row["max_vio_per_layer"] = self._balance.max_violation().tolist()
        row.update(self._observer.metrics(self._groups))
        return row


def _both(name: str, per_layer: torch.Tensor) -> dict[str, Any]:
    """A figure of every layer, and its mean over the model."""
    return {name: float(per_layer.mean()), f"{name}_per_layer": per_layer.tolist()}


def _once(hook: Callable[..., None]) -> Callable[..., None]:
    """Let a hook see the first forward pass alone: later ones are of other micro-batches, or recompute this one."""
    seen = False

    def first(*args: Any, **kwargs: Any) -> None:
        nonlocal seen
        if not seen:
            seen = True
            with torch.no_grad():
                hook(*args, **kwargs)

    return first
