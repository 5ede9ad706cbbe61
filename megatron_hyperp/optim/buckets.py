"""Gradients and weights in buffers that are ordered by owner.

The buffer of a bucket is [ranks, slot], and slot r is what rank r owns: one reduce-scatter brings it reduced gradients
(half the traffic of an all-reduce), one all-gather in the same places brings back everybody's new weights. Weights and
gradients that one rank owns whole live in the buffers, so nothing is copied for them. The pieces of a tensor that
several ranks share are copied in and out: under the HyperP recipe few or small ones, under ``adamw`` all.

Parameters that are alike lie next to each other at equal distances, as a stack: experts come by the thousand, and a
stack is one view (:func:`repeated`) and one operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron_hyperp.parameters import Block, partition_dim

# Elements to which tensors in a slot are aligned: 128 bytes of bf16.
ALIGNMENT = 64
# A bucket is closed only when it is this well balanced: padding, as a share of what it holds.
PADDING = 0.1


@dataclass(frozen=True, slots=True)
class Share:
    """A block of a parameter and the rank, within the parameter's data-parallel group, that owns it."""

    rank: int
    block: Block


Shares = Mapping[torch.nn.Parameter, Sequence[Share]]


def repeated(view: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """Return [count, ...]: a view and what lies ``step``, 2 ``step``, ... elements after it in the same memory."""
    return view.as_strided((count, *view.shape), (step, *view.stride()), view.storage_offset())


@dataclass(slots=True)
class _Stack:
    """Parameters of one shape and the same owners, which lie ``stride`` elements apart, weights and gradients alike."""

    parameters: list[torch.nn.Parameter]
    shares: Sequence[Share]

    @property
    def stride(self) -> int:
        return aligned(self.parameters[0].numel())

    @property
    def size(self) -> int:
        """Elements that it takes."""
        return len(self.parameters) * self.stride

    @property
    def owners(self) -> set[int]:
        return {share.rank for share in self.shares}

    def live_in(self, weights: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Move to two buffers of at least ``size`` elements: weights with their values, gradients zero.

        Args:
            weights: the weights' buffer.
            gradients: that of the gradients; None: they stay where they are.
        """
        first = self.parameters[0]
        for index, parameter in enumerate(self.parameters):
            extent = slice(index * self.stride, index * self.stride + first.numel())
            parameter.data = weights[extent].view(first.shape).copy_(parameter.detach())
            if gradients is not None:
                parameter.main_grad = gradients[extent].view(first.shape)  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Copied:
    """One rank's share of a stack that is copied into its slot and out of it, for the stack does not live there."""

    stack: _Stack
    share: Share
    offset: int

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        """The share's place in a [ranks, slot] buffer, [parameters, groups, rows, columns]."""
        block, count = self.share.block, len(self.stack.parameters)
        flat = buffer[self.share.rank, self.offset : self.offset + count * block.numel]
        return flat.view(count, block.groups, block.rows, block.columns)

    def weights(self) -> torch.Tensor:
        """The share of the parameters, a view [parameters, groups, rows, columns]."""
        return self._of(self.stack.parameters[0].detach())

    def gradients(self) -> torch.Tensor:
        """The share of their gradients, likewise."""
        return self._of(self.stack.parameters[0].main_grad)  # type: ignore[attr-defined]

    def _of(self, first: torch.Tensor) -> torch.Tensor:
        return repeated(self.share.block.of(first), len(self.stack.parameters), self.stack.stride)


class Bucket:
    """Parameters that travel together, in the order in which the backward pass reaches them.

    Args:
        parameters: of one dtype, all reduced over ``group``.
        shares: who owns what of them.
        group: data-parallel ranks that replicate them.
    """

    # Whether gradients live here and are reduced to their owners.
    reduces: ClassVar[bool] = True

    def __init__(self, parameters: Sequence[torch.nn.Parameter], shares: Shares, group: dist.ProcessGroup) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.launched = False
        self._pending: set[torch.nn.Parameter] = set(self.parameters)
        self._reduction: dist.Work | None = None
        self._gather: dist.Work | None = None
        self._stacks = stacks = _alike(self.parameters, shares)
        fill, self._whole, self._copied = _arrange(stacks, group.size())
        # One collective moves equal slots.
        shape = (group.size(), aligned(max(fill)))
        self.gradients, self.weights = self._buffers(shape)
        self.padding = self.gradients.numel() / sum(fill) - 1.0
        # What several ranks share lives beside the slots.
        beside = [stack for stack in stacks if len(stack.owners) > 1]
        self._gradients_beside, self._weights_beside = self._buffers((sum(stack.size for stack in beside),))
        for stack, (rank, offset) in self._whole:
            stack.live_in(self.weights[rank, offset:], self.gradients[rank, offset:] if self.reduces else None)
        offset = 0
        for stack in beside:
            stack.live_in(self._weights_beside[offset:], self._gradients_beside[offset:] if self.reduces else None)
            offset += stack.size

    def _buffers(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros for gradients and for weights."""
        first = self.parameters[0]
        gradients = torch.zeros(shape, dtype=torch.float32, device=first.device)
        return gradients, torch.zeros(shape, dtype=first.dtype, device=first.device)

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of weights and of gradients, with padding and what lies beside the slots."""
        return self.weights.nbytes + self._weights_beside.nbytes, self.gradients.nbytes + self._gradients_beside.nbytes

    def _mine(self) -> Iterator[_Copied]:
        return (copied for copied in self._copied if copied.share.rank == self.group.rank())

    def zero(self) -> None:
        """Zero the gradients; expect those of the next batch."""
        self.gradients.zero_()
        self._gradients_beside.zero_()
        self._pending = set(self.parameters)
        self.launched = False

    def ready(self, parameter: torch.nn.Parameter) -> None:
        """Note that a parameter's gradient is complete."""
        self._pending.discard(parameter)

    @property
    def complete(self) -> bool:
        """Whether the gradients of all parameters are."""
        return not self._pending

    def start_reduce(self) -> None:
        """Start to sum the gradients over the ranks, each rank's slot to that rank."""
        self.launched = True
        if self.group.size() == 1:
            return
        for copied in self._copied:
            copied.within(self.gradients).copy_(copied.gradients())
        own = self.gradients[self.group.rank()]
        self._reduction = dist.reduce_scatter_tensor(own, self.gradients.view(-1), group=self.group, async_op=True)

    def finish_reduce(self) -> None:
        """Wait for the sums; ``main_grad`` then holds them in the blocks that this rank owns, and nothing elsewhere."""
        if self._reduction is None:
            return
        self._reduction.wait()
        self._reduction = None
        for copied in self._mine():
            copied.gradients().copy_(copied.within(self.gradients))

    def scale(self, factor: float | torch.Tensor) -> None:
        """Multiply the gradients that this rank owns."""
        self.gradients[self.group.rank()].mul_(factor)
        for copied in self._mine():
            copied.gradients().mul_(factor)

    def fill_slot(self) -> None:
        """Copy what this rank owns of shared tensors into its slot, before it is sent."""
        if self.group.size() > 1:
            for copied in self._mine():
                copied.within(self.weights).copy_(copied.weights())

    def start_gather(self) -> None:
        """Start to send the slot of weights that this rank owns to all, and to receive theirs."""
        if self.group.size() > 1:
            self._gather = self._send()

    def _send(self) -> dist.Work | None:
        own = self.weights[self.group.rank()]
        return dist.all_gather_into_tensor(self.weights.view(-1), own, group=self.group, async_op=True)

    def _receive(self) -> None:
        """Bring what has come into the slots, if it came elsewhere."""

    def as_gathered(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        """Return what the last gathering made of a parameter's new values, or of some of them, on every rank."""
        del parameter
        return values

    def finish_gather(self) -> None:
        """Wait until every weight of the bucket is up to date."""
        if self._gather is None:
            return
        self._gather.wait()
        self._gather = None
        self._receive()
        for copied in self._copied:
            copied.weights().copy_(copied.within(self.weights))


class WeightBucket(Bucket):
    """A bucket of weights alone: Megatron-Core's DistributedDataParallel has reduced the gradients where they are."""

    reduces = False

    def _buffers(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.parameters[0]
        # Sizes without memory: nothing reads or writes it.
        return torch.zeros(shape, device="meta"), torch.zeros(shape, dtype=first.dtype, device=first.device)

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of weights, and 0 for gradients."""
        return super().held[0], 0


def _alike(parameters: Sequence[torch.nn.Parameter], shares: Shares) -> list[_Stack]:
    """Group parameters of one shape and split with the same owners.

    Each group is in the model's order, the reverse of the backward pass's. So is the plan of ownership, and with it
    every family of the optimizer. A family thus finds its matrices one after the other and needs no order of its own,
    which all ranks that share it would have to agree on.
    """
    groups: dict[tuple[Any, ...], _Stack] = {}
    for parameter in reversed(parameters):
        owners = tuple(shares[parameter])
        key = (parameter.shape, partition_dim(parameter), owners)
        groups.setdefault(key, _Stack([], owners)).parameters.append(parameter)
    return list(groups.values())


def _arrange(
    stacks: Sequence[_Stack], ranks: int
) -> tuple[list[int], list[tuple[_Stack, tuple[int, int]]], list[_Copied]]:
    """Lay out slots: return how full each is, rank and offset of the stacks with one owner, and what is copied."""
    fill = [0] * ranks
    offsets: list[tuple[_Stack, tuple[int, int]]] = []
    copied: list[_Copied] = []
    for stack in stacks:
        if len(stack.owners) == 1:
            (rank,) = stack.owners
            offsets.append((stack, (rank, fill[rank])))
            fill[rank] += stack.size
    for stack in stacks:
        if len(stack.owners) > 1:
            for share in stack.shares:
                copied.append(_Copied(stack, share, fill[share.rank]))
                fill[share.rank] += len(stack.parameters) * share.block.numel
    return fill, offsets, copied


def aligned(elements: int) -> int:
    """Elements that a tensor takes in a slot."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def cut_into_buckets(
    parameters: Sequence[torch.nn.Parameter], shares: Shares, ranks: int, bucket_size: int | None
) -> list[list[torch.nn.Parameter]]:
    """Cut parameters into buckets.

    Args:
        parameters: in the order of the backward pass.
        shares: who owns what of them.
        ranks: of their data-parallel group.
        bucket_size: elements from which on a bucket is closed, once its slots are balanced; None for one bucket.
    """
    buckets: list[_Draft] = [_Draft(ranks)]
    for parameter in parameters:
        draft = buckets[-1]
        full = bucket_size is not None and sum(draft.fill) >= bucket_size and draft.padding <= PADDING
        # While padding still falls, the matrices of the last ranks are yet to come: closed before them, this bucket
        # would leave every later one out of balance.
        if full and draft.padding_with(parameter, shares) >= draft.padding:
            buckets.append(_Draft(ranks))
        buckets[-1].add([parameter], shares)
    # What is left over at the end may be out of balance by itself.
    while len(buckets) > 1 and buckets[-1].padding > PADDING:
        last = buckets.pop()
        buckets[-1].add(last.parameters, shares)
    return [draft.parameters for draft in buckets]


class _Draft:
    """A bucket in the making: its parameters, and the elements that each rank owns of them."""

    def __init__(self, ranks: int) -> None:
        self.parameters: list[torch.nn.Parameter] = []
        self.fill = [0] * ranks

    def add(self, parameters: Sequence[torch.nn.Parameter], shares: Shares) -> None:
        self.parameters += parameters
        for parameter in parameters:
            _pour(self.fill, shares[parameter])

    @property
    def padding(self) -> float:
        """Padding as a share of what the bucket holds."""
        return _padding(self.fill)

    def padding_with(self, parameter: torch.nn.Parameter, shares: Shares) -> float:
        """What the padding would be with one more parameter."""
        fill = list(self.fill)
        _pour(fill, shares[parameter])
        return _padding(fill)


def _pour(fill: list[int], shares: Sequence[Share]) -> None:
    for share in shares:
        fill[share.rank] += share.block.numel


def _padding(fill: list[int]) -> float:
    return max(fill) * len(fill) / sum(fill) - 1.0
