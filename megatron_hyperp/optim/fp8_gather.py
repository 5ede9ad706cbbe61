"""Weights that travel from their owners to everybody in FP8: half the bytes of bf16.

The owner rounds a new weight exactly as the layer's product will, and every rank, the owner too, takes the rounded one.
Rounding it again gives the same number. With scales from the largest element: that element survives as it is, so the
scale is found again, and the others, which bf16 holds to 2^-9, lie far closer to their FP8 number than half of FP8's
step of at least 2^-4. With scales from the sphere, powers of two, nothing moves at all. So layers
compute what they do where bf16 is gathered, bit for bit. The masters, and what is saved, are never rounded.

Scales from largest elements take one all-reduce of a number per matrix before anything is sent; scales from the sphere
are known to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_hyperp.numerics.fp8 import DTYPES, Format, WeightScale, encoded, round_trip, scale_of
from megatron_hyperp.optim.buckets import Bucket, Shares

_FORMAT: Format = "e4m3"


@dataclass(frozen=True, slots=True)
class _Place:
    """Parameters, or one rank's shares of them, that lie at equal distances in that rank's slot.

    Attributes:
        rank: whose slot it is.
        extent: elements of the slot.
        numbers: of the parameters, in the bucket's scales.
    """

    rank: int
    extent: slice
    numbers: slice

    def rows(self, buffer: torch.Tensor) -> torch.Tensor:
        """The place in a [ranks, slot] buffer, [parameters, elements], padding between parameters included."""
        return buffer[self.rank, self.extent].view(self.numbers.stop - self.numbers.start, -1)


class Fp8Bucket(Bucket):
    """A bucket whose weights travel as e4m3.

    Args:
        parameters: of one dtype, all reduced over ``group``, whose products round them to FP8.
        shares: who owns what of them.
        group: data-parallel ranks that replicate them.
        scales: where the scale of each comes from; all from largest elements over one group, or all fixed.

    Attributes:
        is_fixed: whether scales are.
        scale_group: ranks beside the owners whose parts share a scale, or None.
        exact: whether the next gathering, and then whether the last one, sends weights as they are.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        shares: Shares,
        group: dist.ProcessGroup,
        scales: Mapping[torch.nn.Parameter, WeightScale],
    ) -> None:
        super().__init__(parameters, shares, group)
        self.scale_group = scales[self.parameters[0]].group
        numbers, number = {}, 0
        for stack in self._stacks:
            numbers[id(stack)] = slice(number, number + len(stack.parameters))
            number += len(stack.parameters)
        self._places = [
            _Place(rank, slice(offset, offset + stack.size), numbers[id(stack)])
            for stack, (rank, offset) in self._whole
        ]
        for copied in self._copied:
            elements = len(copied.stack.parameters) * copied.share.block.numel
            extent = slice(copied.offset, copied.offset + elements)
            self._places.append(_Place(copied.share.rank, extent, numbers[id(copied.stack)]))
        ordered = [parameter for stack in self._stacks for parameter in stack.parameters]
        self._number = {parameter: index for index, parameter in enumerate(ordered)}
        fixed = [scales[parameter].fixed for parameter in ordered]
        self.is_fixed = None not in fixed
        home = self.weights.device
        self._scales = torch.tensor([value or 1.0 for value in fixed], dtype=torch.float32, device=home)
        self._sent: torch.Tensor | None = None
        self.exact = False

    def _own(self) -> Iterator[_Place]:
        return (place for place in self._places if place.rank == self.group.rank())

    def largest(self) -> torch.Tensor:
        """Largest absolute values in this rank's slot, [parameters] fp32; 0 where it owns nothing of one."""
        found = torch.zeros_like(self._scales)
        for place in self._own():
            largest = torch.linalg.vector_norm(place.rows(self.weights), torch.inf, dim=1).float()
            found[place.numbers] = torch.maximum(found[place.numbers], largest)
        return found

    def set_scales(self, largest: torch.Tensor) -> None:
        """Take the largest absolute values of the parameters, [parameters] fp32, for their scales."""
        self._scales = scale_of(largest, _FORMAT)

    def _send(self) -> dist.Work | None:
        if self.exact:
            return super()._send()
        self._sent = torch.empty(self.weights.shape, dtype=DTYPES[_FORMAT], device=self.weights.device)
        for place in self._own():
            scale = self._scales[place.numbers, None]
            place.rows(self._sent).copy_(encoded(place.rows(self.weights), _FORMAT, scale))
        # Backends know bytes.
        sent = self._sent.view(torch.uint8)
        return dist.all_gather_into_tensor(sent.view(-1), sent[self.group.rank()], group=self.group, async_op=True)

    def _receive(self) -> None:
        if self._sent is None:
            return
        for place in self._places:
            values = place.rows(self._sent).to(self.weights.dtype)
            torch.div(values, self._scales[place.numbers, None], out=place.rows(self.weights))
        self._sent = None

    def as_gathered(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        """Return what the last gathering made of a parameter's new values: rounded ones, unless it was exact."""
        return values if self.exact else round_trip(values, _FORMAT, self._scales[self._number[parameter]])


def agree_on_scales(buckets: Iterable[Fp8Bucket]) -> None:
    """Find the scales of the next gathering: one all-reduce for all parameters of the same ranks; collective."""
    together: dict[tuple[dist.ProcessGroup, dist.ProcessGroup | None], list[Fp8Bucket]] = {}
    for bucket in buckets:
        if not bucket.is_fixed and bucket.group.size() > 1:
            together.setdefault((bucket.group, bucket.scale_group), []).append(bucket)
    for groups, alike in together.items():
        parts = [bucket.largest() for bucket in alike]
        largest = torch.cat(parts)
        for group in groups:
            if group is not None and group.size() > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        for bucket, part in zip(alike, largest.split([len(part) for part in parts]), strict=True):
            bucket.set_scales(part)
