"""Gradients and weights in buffers that are ordered by owner.

The buffer of a bucket is [ranks, slot], and slot r is what rank r owns: one reduce-scatter brings it reduced gradients
(half the traffic of an all-reduce), one all-gather in the same places brings back everybody's new weights. Weights and
gradients that one rank owns whole live in the buffers, so nothing is copied for them. The pieces of a tensor that
several ranks share are copied in and out; such tensors are few or small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_hyperp.parameters import Block

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


@dataclass(slots=True)
class _Copied:
    """A block that is copied into a slot and out of it, for its parameter does not live in the buffers."""

    parameter: torch.nn.Parameter
    share: Share
    offset: int

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        """The block's place in a [ranks, slot] buffer, in its shape [groups, rows, columns]."""
        block = self.share.block
        flat = buffer[self.share.rank, self.offset : self.offset + block.numel]
        return flat.view(block.groups, block.rows, block.columns)


class Bucket:
    """Parameters that travel together, in the order in which the backward pass reaches them.

    Args:
        parameters: of one dtype, all reduced over ``group``.
        shares: who owns what of them.
        group: data-parallel ranks that replicate them.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], shares: Shares, group: dist.ProcessGroup) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.launched = False
        self._pending: set[torch.nn.Parameter] = set(self.parameters)
        self._reduction: dist.Work | None = None
        self._gather: dist.Work | None = None
        fill, places, self._copied = _arrange(self.parameters, shares, group.size())
        # One collective moves equal slots.
        shape = (group.size(), _aligned(max(fill)))
        first = self.parameters[0]
        self.gradients = torch.zeros(shape, dtype=torch.float32, device=first.device)
        self.weights = torch.zeros(shape, dtype=first.dtype, device=first.device)
        self.padding = self.gradients.numel() / sum(fill) - 1.0
        self._own_gradients: list[torch.Tensor] = [self.gradients[group.rank()]]
        self._beside: list[torch.Tensor] = []
        for parameter in self.parameters:
            if parameter in places:
                rank, offset = places[parameter]
                extent = slice(offset, offset + parameter.numel())
                weight = self.weights[rank, extent].view(parameter.shape).copy_(parameter.detach())
                parameter.data = weight
                gradient = self.gradients[rank, extent].view(parameter.shape)
            else:
                gradient = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                self._beside.append(gradient)
            parameter.main_grad = gradient  # type: ignore[attr-defined]

    def _mine(self) -> Iterator[_Copied]:
        return (copied for copied in self._copied if copied.share.rank == self.group.rank())

    def zero(self) -> None:
        """Zero the gradients; expect those of the next batch."""
        self.gradients.zero_()
        if self._beside:
            torch._foreach_zero_(self._beside)
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
            copied.within(self.gradients).copy_(copied.share.block.of(copied.parameter.main_grad))  # type: ignore[attr-defined]
        own = self.gradients[self.group.rank()]
        self._reduction = dist.reduce_scatter_tensor(own, self.gradients.view(-1), group=self.group, async_op=True)

    def finish_reduce(self) -> None:
        """Wait for the sums; ``main_grad`` then holds them in the blocks that this rank owns, and nothing elsewhere."""
        if self._reduction is None:
            return
        self._reduction.wait()
        self._reduction = None
        for copied in self._mine():
            copied.share.block.of(copied.parameter.main_grad).copy_(copied.within(self.gradients))  # type: ignore[attr-defined]

    def scale(self, factor: float | torch.Tensor) -> None:
        """Multiply the gradients that this rank owns."""
        self.gradients[self.group.rank()].mul_(factor)
        for copied in self._mine():
            copied.share.block.of(copied.parameter.main_grad).mul_(factor)  # type: ignore[attr-defined]

    def start_gather(self) -> None:
        """Start to send the weights that this rank owns to all, and to receive theirs."""
        if self.group.size() == 1:
            return
        for copied in self._mine():
            copied.within(self.weights).copy_(copied.share.block.of(copied.parameter.detach()))
        own = self.weights[self.group.rank()]
        self._gather = dist.all_gather_into_tensor(self.weights.view(-1), own, group=self.group, async_op=True)

    def finish_gather(self) -> None:
        """Wait until every weight of the bucket is up to date."""
        if self._gather is None:
            return
        self._gather.wait()
        self._gather = None
        for copied in self._copied:
            copied.share.block.of(copied.parameter.detach()).copy_(copied.within(self.weights))


def _arrange(
    parameters: Sequence[torch.nn.Parameter], shares: Shares, ranks: int
) -> tuple[list[int], dict[torch.nn.Parameter, tuple[int, int]], list[_Copied]]:
    """Lay out slots: return how full each is, where the parameters with one owner live, and what is copied."""
    fill = [0] * ranks
    places: dict[torch.nn.Parameter, tuple[int, int]] = {}
    copied: list[_Copied] = []
    for parameter in parameters:
        owners = {share.rank for share in shares[parameter]}
        if len(owners) == 1:
            (rank,) = owners
            places[parameter] = (rank, fill[rank])
            fill[rank] += _aligned(parameter.numel())
    for parameter in parameters:
        if parameter not in places:
            for share in shares[parameter]:
                copied.append(_Copied(parameter, share, fill[share.rank]))
                fill[share.rank] += share.block.numel
    return fill, places, copied


def _aligned(elements: int) -> int:
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
        if bucket_size is not None and sum(draft.fill) >= bucket_size and draft.padding <= PADDING:
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
            for share in shares[parameter]:
                self.fill[share.rank] += share.block.numel

    @property
    def padding(self) -> float:
        """Padding as a share of what the bucket holds."""
        return max(self.fill) * len(self.fill) / sum(self.fill) - 1.0
