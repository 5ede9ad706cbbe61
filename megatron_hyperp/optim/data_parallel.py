"""Data parallelism that reduces gradients to their owners: Megatron-Core's DDP interface over owner-ordered buckets.

Megatron-Core's DistributedDataParallel cuts its buffers into equal runs of bytes; Newton-Schulz needs whole matrices.
Its buffers could hold them in the order of their owners only with padding parameters that the model does not have, and
the row cuts that keep Adam's shards alike on both ends of a pipeline (tied embeddings are summed over it after the
reduction) have no place in them. So the buffers are our own (``buckets.py``), behind the schedules' interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.megatron_compat.data_parallel import DataParallelBase
from megatron_hyperp.numerics.fp8 import WeightScale
from megatron_hyperp.optim.buckets import Bucket, Shares, WeightBucket, cut_into_buckets
from megatron_hyperp.optim.fp8_gather import Fp8Bucket, agree_on_scales


class Exchange:
    """The buckets of all pipeline chunks of a rank, and the order in which they travel.

    Buckets may reach over chunks: those of an interleaved schedule are often too small to balance owners by themselves.

    Args:
        overlap_grad_reduce: reduce buckets while the backward pass goes on.
        overlap_param_gather: gather weights while the next forward pass goes on.
        reduces: whether gradients are reduced here; else Megatron-Core's DistributedDataParallel has done it.
        average_over: data-parallel ranks by whose number gradients are divided; 1 for sums, which
            ``calculate_per_token_loss`` of Megatron-Core divides by tokens.
    """

    def __init__(
        self,
        *,
        overlap_grad_reduce: bool = False,
        overlap_param_gather: bool = False,
        reduces: bool = True,
        average_over: int = 1,
    ) -> None:
        self.reduces = reduces
        self.average_over = average_over
        self.overlap_grad_reduce = overlap_grad_reduce
        self.overlap_param_gather = overlap_param_gather
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[torch.nn.Parameter, Bucket] = {}
        self._reduced = False

    def lay_out(
        self,
        parameters: Sequence[torch.nn.Parameter],
        shares: Shares,
        group_of: Callable[[torch.nn.Parameter], dist.ProcessGroup],
        bucket_size: int | None,
        scales: Mapping[torch.nn.Parameter, WeightScale],
    ) -> None:
        """Move weights and gradients into buckets by owner; call once.

        Args:
            parameters: in the order in which the backward pass reaches them.
            shares: who owns what of each.
            group_of: a parameter's data-parallel group.
            bucket_size: see :func:`cut_into_buckets`.
            scales: of the parameters that travel in FP8.
        """
        assert not self.buckets
        kinds: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            scale = scales.get(parameter)
            # In FP8 with those that share a scale with the same ranks.
            fp8 = None if scale is None else (scale.group,)
            kinds.setdefault((group_of(parameter), parameter.dtype, fp8), []).append(parameter)
        for (group, _, fp8), alike in kinds.items():
            kind = Bucket if self.reduces else WeightBucket
            for bucket in cut_into_buckets(alike, shares, group.size(), bucket_size):
                self.buckets.append(
                    kind(bucket, shares, group) if fp8 is None else Fp8Bucket(bucket, shares, group, scales)
                )
        # In the order in which the backward pass completes them.
        position = {parameter: index for index, parameter in enumerate(parameters)}
        self.buckets.sort(key=lambda bucket: max(position[parameter] for parameter in bucket.parameters))
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}

    def ready(self, parameter: torch.nn.Parameter) -> None:
        """Note that a gradient is complete; with overlap, start the reductions whose turn it is."""
        self.bucket_of[parameter].ready(parameter)
        if self.overlap_grad_reduce:
            self._start(complete_only=True)

    def _start(self, *, complete_only: bool) -> None:
        """Start reductions in an order that is the same on every rank.

        A parameter may get no gradient on one rank alone, an idle expert's for one; a bucket that started out of turn
        would meet another one there.
        """
        for bucket in self.buckets:
            if bucket.launched:
                continue
            if complete_only and not bucket.complete:
                return
            bucket.start_reduce()

    def start_grad_sync(self) -> None:
        """Start every reduction that has not been started."""
        self._start(complete_only=False)

    def finish_grad_sync(self) -> None:
        """Start what has not been started and wait for all of it; nothing if that is done."""
        if self._reduced or not self.reduces:
            return
        self._reduced = True
        self.start_grad_sync()
        for bucket in self.buckets:
            bucket.finish_reduce()
            if self.average_over > 1:
                bucket.scale(1.0 / self.average_over)

    def zero(self) -> None:
        """Zero the gradients that live here; expect those of the next batch."""
        self._reduced = False
        for parameter, bucket in self.bucket_of.items():
            if bucket.reduces:
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        for bucket in self.buckets:
            bucket.zero()

    def start_param_sync(self, *, exact: bool = False) -> None:
        """Start to gather the weights from their owners; wait for them unless they overlap with the forward pass.

        Args:
            exact: as they are, also those that travel in FP8.
        """
        for each in self.buckets:
            each.fill_slot()
        for fp8 in self.in_fp8:
            fp8.exact = exact
        if not exact:
            agree_on_scales(self.in_fp8)
        for bucket in reversed(self.buckets):
            bucket.start_gather()
        if not self.overlap_param_gather:
            self.finish_param_sync()

    def finish_param_sync(self) -> None:
        """Wait until every weight is up to date."""
        for bucket in reversed(self.buckets):
            bucket.finish_gather()

    @property
    def in_fp8(self) -> list[Fp8Bucket]:
        """Buckets whose weights travel in FP8, and so are not those of their owners."""
        return [bucket for bucket in self.buckets if isinstance(bucket, Fp8Bucket)]


class DataParallel(DataParallelBase):  # type: ignore[misc]  # Megatron-Core has no types
    """A pipeline chunk with its gradients, as Megatron-Core's schedules and ``finalize_model_grads`` want it.

    The chunks of a rank share one exchange, which the optimizer lays out; until then there is nowhere to accumulate
    gradients. What concerns all of it (reduce, scale, zero, gather) happens when the first chunk is asked, and nothing
    when the others are.

    Args:
        config: of the model.
        module: the chunk.
        exchange: the buckets of all chunks.
        first: whether it is the first chunk.
    """

    def __init__(self, config: TransformerConfig, module: torch.nn.Module, exchange: Exchange, *, first: bool) -> None:
        super().__init__(config=config, module=module)
        # finalize_model_grads asks it for Megatron's FSDP.
        self.ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=exchange.overlap_grad_reduce,
            overlap_param_gather=exchange.overlap_param_gather,
        )
        self.exchange = exchange
        self._first = first
        self._is_last_micro_batch = True
        for parameter in self._trainable():
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(self._accumulate)
        if exchange.overlap_param_gather:
            for part in module.modules():
                part.register_forward_pre_hook(self._wait_for_weights)

    def _trainable(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    def _accumulate(self, parameter: torch.Tensor) -> None:
        """Add a gradient to ``main_grad``; after the last micro-batch it is complete."""
        assert isinstance(parameter, torch.nn.Parameter)
        # A product's kernel that has added it leaves an empty one, but zeros for tied embeddings, to which autograd
        # adds what the lookup contributes.
        added = parameter.grad_added_to_main_grad and not getattr(parameter, "zero_out_wgrad", False)  # type: ignore[attr-defined]
        if parameter.grad is not None and not added:
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
        if self._is_last_micro_batch:
            self.exchange.ready(parameter)

    def _wait_for_weights(self, module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in self.exchange.bucket_of:
                self.exchange.bucket_of[parameter].finish_gather()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, gradients accumulate: more micro-batches follow."""
        self._is_last_micro_batch = False
        try:
            yield
        finally:
            self._is_last_micro_batch = True

    def start_grad_sync(self, *_: Any) -> None:
        """Start every reduction that has not been started."""
        if self._first:
            self.exchange.start_grad_sync()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start what has not been started and wait for all of it.

        Raises:
            ValueError: ``force_all_reduce``, which this class does not do.
        """
        if force_all_reduce:
            raise ValueError("force_all_reduce is True; gradients are reduced to their owners only, leave it False")
        if self._first:
            self.exchange.finish_grad_sync()

    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply the gradients that this rank owns."""
        if self._first:
            for bucket in self.exchange.buckets:
                bucket.scale(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Zero the gradients, before each batch."""
        if self._first:
            self.exchange.zero()

    def start_param_sync(self, *_: Any, **__: Any) -> None:
        """Gather the weights from their owners; with overlap, only start to."""
        if self._first:
            self.exchange.start_param_sync()


def wrap_for_data_parallelism(
    config: TransformerConfig,
    modules: Sequence[torch.nn.Module],
    *,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    data_parallel_size: int = 1,
) -> list[DataParallel]:
    """Wrap this rank's pipeline chunks and tell Megatron-Core's schedules, through ``config``, how to use them.

    The schedules may be given the wrapped chunks, or the modules themselves.

    Args:
        config: of the model.
        modules: its chunks on this rank.
        overlap_grad_reduce: reduce gradients while the backward pass goes on.
        overlap_param_gather: gather weights while the next forward pass goes on.
        data_parallel_size: ranks over which gradients are averaged where ``config.calculate_per_token_loss`` is False.
    """
    exchange = Exchange(
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        average_over=1 if config.calculate_per_token_loss else data_parallel_size,
    )
    chunks = [DataParallel(config, module, exchange, first=not index) for index, module in enumerate(modules)]

    def finalize(_: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(chunks, *args, **kwargs)

    config.finalize_model_grads_func = finalize
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks
