"""Data parallelism that reduces gradients to their owners: Megatron-Core's DDP interface over owner-ordered buckets.

Megatron-Core's DistributedDataParallel cuts its buffers into equal runs of bytes; Newton-Schulz needs whole matrices.
Its buffers could hold them in the order of their owners only with padding parameters that the model does not have, and
the row cuts that keep Adam's shards alike on both ends of a pipeline (tied embeddings are summed over it after the
reduction) have no place in them. So the buffers are our own (``buckets.py``), behind the schedules' interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp.optim.buckets import Bucket, Shares, cut_into_buckets


class DataParallel(_BaseDataParallel):  # type: ignore[misc]  # Megatron-Core has no types
    """A pipeline chunk with its gradients, as Megatron-Core's schedules and ``finalize_model_grads`` want it.

    Until :meth:`lay_out`, which the optimizer calls, there is nowhere to accumulate gradients.

    Args:
        config: of the model.
        module: the chunk.
        overlap_grad_reduce: reduce buckets while the backward pass goes on.
        overlap_param_gather: gather weights while the next forward pass goes on.
        after: the chunk that the backward pass finishes before this one, under the interleaved schedule.
    """

    def __init__(
        self,
        config: TransformerConfig,
        module: torch.nn.Module,
        *,
        overlap_grad_reduce: bool,
        overlap_param_gather: bool,
        after: DataParallel | None = None,
    ) -> None:
        super().__init__(config=config, module=module)
        # finalize_model_grads asks it for Megatron's FSDP.
        self.ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
        )
        self.overlap_grad_reduce = overlap_grad_reduce
        self.overlap_param_gather = overlap_param_gather
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[torch.nn.Parameter, Bucket] = {}
        # A list, for a module that is an attribute would become a part of this one.
        self._after = [after] if after is not None else []
        self._is_last_micro_batch = True

    def lay_out(
        self,
        shares: Shares,
        group_of: Callable[[torch.nn.Parameter], dist.ProcessGroup],
        bucket_size: int | None,
    ) -> None:
        """Move weights and gradients into buckets by owner; call once.

        Args:
            shares: who owns what of each trainable parameter.
            group_of: a parameter's data-parallel group.
            bucket_size: see :func:`cut_into_buckets`.
        """
        assert not self.buckets
        backward_order = [parameter for parameter in reversed(list(self.module.parameters())) if parameter in shares]
        kinds: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
        for parameter in backward_order:
            kinds.setdefault((group_of(parameter), parameter.dtype), []).append(parameter)
        position = {parameter: index for index, parameter in enumerate(backward_order)}
        for (group, _), parameters in kinds.items():
            for bucket in cut_into_buckets(parameters, shares, group.size(), bucket_size):
                self.buckets.append(Bucket(bucket, shares, group))
        # In the order in which the backward pass completes them.
        self.buckets.sort(key=lambda bucket: max(position[parameter] for parameter in bucket.parameters))
        self._bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        for parameter in backward_order:
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(self._accumulate)
        if self.overlap_param_gather:
            for module in self.module.modules():
                module.register_forward_pre_hook(self._wait_for_weights)

    def _accumulate(self, parameter: torch.Tensor) -> None:
        """Add a gradient to ``main_grad``; after the last micro-batch, reduce the buckets that are complete."""
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
        if self._is_last_micro_batch:
            self._bucket_of[parameter].ready(parameter)
            if self.overlap_grad_reduce:
                self._start(complete_only=True)

    def _start(self, *, complete_only: bool) -> None:
        """Start reductions in an order that is the same on every rank.

        A parameter may get no gradient on one rank alone, an idle expert's for one; started out of turn, the others'
        buckets would then meet the wrong ones.
        """
        for chunk in self._after:
            if not complete_only:
                chunk._start(complete_only=False)
            elif not all(bucket.launched for bucket in chunk.buckets):
                return
        for bucket in self.buckets:
            if bucket.launched:
                continue
            if complete_only and not bucket.complete:
                return
            bucket.start_reduce()

    def _wait_for_weights(self, module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in self._bucket_of:
                self._bucket_of[parameter].finish_gather()

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
        self._start(complete_only=False)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start what has not been started and wait for all of it.

        Raises:
            ValueError: ``force_all_reduce``, which this class does not do.
        """
        if force_all_reduce:
            raise ValueError("force_all_reduce is True; gradients are reduced to their owners only")
        self._start(complete_only=False)
        for bucket in self.buckets:
            bucket.finish_reduce()

    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply the gradients that this rank owns."""
        for bucket in self.buckets:
            bucket.scale(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Zero the gradients, before each batch."""
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            bucket.zero()

    def start_param_sync(self, *_: Any, **__: Any) -> None:
        """Start to gather the weights from their owners; wait for them unless they overlap with the forward pass."""
        for bucket in reversed(self.buckets):
            bucket.start_gather()
        if not self.overlap_param_gather:
            self.finish_param_sync()

    def finish_param_sync(self) -> None:
        """Wait until every weight is up to date."""
        for bucket in reversed(self.buckets):
            bucket.finish_gather()


def wrap_for_data_parallelism(
    config: TransformerConfig,
    modules: Sequence[torch.nn.Module],
    *,
    overlap_grad_reduce: bool,
    overlap_param_gather: bool,
) -> list[DataParallel]:
    """Wrap this rank's pipeline chunks and tell Megatron-Core's schedules, through ``config``, how to use them."""
    chunks: list[DataParallel] = []
    for module in reversed(modules):
        after = chunks[0] if chunks else None
        chunk = DataParallel(
            config,
            module,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
            after=after,
        )
        chunks.insert(0, chunk)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks
