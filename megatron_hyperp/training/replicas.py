"""Ranks that should hold the same bits: do they? Compared every K steps.

A step's weights are compared after the backward pass and before the update: owners send new weights in every update,
which overwrite a copy that went bad, but not what its gradients did to the sums. So a look every K steps sees all that
lasts (a bad cell, a broken gather), and one in K of the single flips in copies. What tensor-parallel ranks each keep
(gains and routers, with their momenta) stays different for ever, and is seen the next time.
"""

from __future__ import annotations

import functools
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.distributed import HyperPOptimizer
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.parameters import REPLICATED, is_expert, partition_dim

# Words of 8 bytes that are multiplied and summed at a time.
BLOCK = 2**20
# Odd numbers have an inverse modulo 2^64: no change of a single word is multiplied away. They are those of splitmix64.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# The kind of a rank's own masters: the most telling, so the first to be told.
MASTERS = -1
# More ranks than this are counted, not listed.
LISTED = 8

if TYPE_CHECKING:
    from megatron_hyperp.model.delayed import DelayedScales
    from megatron_hyperp.moe.balance import Balance

Named = list[tuple[str, torch.Tensor]]


def _signed(number: int) -> int:
    """The int64 with the bits of a number below 2^64."""
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache(maxsize=2)
def _factors(device: torch.device, count: int) -> torch.Tensor:
    """[count] odd int64, one for each place."""
    numbers = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    numbers = (numbers ^ (numbers >> 30)) * _signed(_FIRST)
    numbers = (numbers ^ (numbers >> 27)) * _signed(_SECOND)
    return numbers | 1


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number, int64 on the tensor's device, that any change of up to 8 neighbouring bytes changes.

    Words of 8 bytes are mixed, each by an odd number of its place, and summed modulo 2^64; every step of it but the sum
    can be undone. Integers sum to the same number in any order, so that no device and no kernel matters.

    Args:
        tensor: any shape and dtype; no copy of a large contiguous one is made.
    """
    content = tensor.detach().reshape(-1).view(torch.uint8)
    if content.numel() % 8 or content.storage_offset() % 8:
        content = torch.nn.functional.pad(content, (0, -content.numel() % 8)).clone()
    factors = _factors(tensor.device, BLOCK)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for words in content.view(torch.int64).split(BLOCK):
        places = factors[: len(words)]
        mixed = words * places
        # A product carries upwards alone: without this two signs that flip would cancel.
        mixed ^= (mixed >> 32).bitwise_and_(0xFFFFFFFF)
        total = total * _signed(_FIRST) + mixed.mul_(places).sum()
    return total


@dataclass(frozen=True, slots=True)
class Copies:
    """What every rank of a group should hold the same bits of.

    Attributes:
        group: the ranks.
        named: returns this rank's tensors, in the same order on all of them.
    """

    group: dist.ProcessGroup
    named: Callable[[], Named]


@dataclass(frozen=True, slots=True)
class Difference:
    """What a rank has to say of copies that differ.

    Attributes:
        kind: place of the copies in :attr:`Replicas.copies`, or ``MASTERS``.
        ranks: of their group.
        name: of the first that differs.
        value: its fingerprint here.
        count: how many differ.
        host: where this rank is.
    """

    kind: int
    ranks: tuple[int, ...]
    name: str
    value: int
    count: int
    host: str


class Replicas:
    """Compares copies; all calls are collective.

    Args:
        interval: iterations between comparisons; 0: none.
        optimizer: with the weights, their owners and its state.
        balance: loads of a mixture of experts; None for a dense model.
        scales: of delayed scaling in emulated FP8, if there are any.
        event: told of a difference, with the iteration, a kind and a line.
    """

    def __init__(
        self,
        interval: int,
        optimizer: HyperPOptimizer,
        balance: Balance | None = None,
        scales: DelayedScales | None = None,
        *,
        event: Callable[[int, str, str], None],
    ) -> None:
        self._interval, self._optimizer, self._event = interval, optimizer, event
        self.copies: list[Copies] = []
        if interval:
            self.copies = [
                *_weights(optimizer),
                _state(optimizer),
                Copies(optimizer.get_grad_stats_parallel_group(), lambda: _everywhere(optimizer, balance, scales)),
            ]

    def check_step(self, iteration: int) -> None:
        """Compare the weights that an iteration's gradients are of, if it is a multiple of the interval.

        Raises: as :meth:`check`.
        """
        if self._interval and iteration % self._interval == 0:
            self.check(iteration - 1, f"in iteration {iteration}")

    @torch.no_grad()
    def check(self, iteration: int, when: str) -> None:
        """Compare all copies, unless none ever are.

        Args:
            iteration: the last one done.
            when: for the message: where in the run this is.

        Raises:
            UsageError: there is a difference, on all ranks alike.
        """
        if not self._interval:
            return
        self._optimizer.exchange.finish_param_sync()
        own = [self._compare(kind, copies) for kind, copies in enumerate(self.copies)]
        own.append(self._compare_masters())
        found = [difference for difference in own if difference is not None]
        bad = torch.tensor(len(found), device=_home(self._optimizer))
        dist.all_reduce(bad)
        if not bad.item():
            return
        told: list[list[Difference]] = [[]] * dist.get_world_size()
        dist.all_gather_object(told, found)
        line = f"{describe(told)}, found {when}"
        self._event(iteration, "corrupt", line)
        raise UsageError(
            f"{line}; nothing of it was saved: start again from the last checkpoint, and without that node if this"
            " happens twice (docs/determinism.md)",
            same_on_all_ranks=True,
        )

    def _compare(self, kind: int, copies: Copies) -> Difference | None:
        """Compare this rank's part of one kind of copies with the others'."""
        named = copies.named()
        if copies.group.size() == 1 or not named:
            return None
        values = torch.stack([fingerprint(tensor) for _, tensor in named])
        # The largest of x and of ~x: the latter is the complement of the smallest x.
        extremes = torch.cat([values, ~values])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=copies.group)
        differs = extremes[: len(named)] != ~extremes[len(named) :]
        return _difference(kind, dist.get_process_group_ranks(copies.group), named, values, differs)

    def _compare_masters(self) -> Difference | None:
        """Compare what this rank owns with the weights that it sent: its fp32 masters, rounded."""
        named: Named = []
        values: list[torch.Tensor] = []
        exchange = self._optimizer.exchange
        for entry, weights, master in _owned(self._optimizer):
            named.append((entry.name, master))
            sent = exchange.bucket_of[entry.parameter].as_gathered(entry.parameter, master.to(weights.dtype))
            values.append(fingerprint(sent) - fingerprint(weights))
        if not named:
            return None
        return _difference(MASTERS, [dist.get_rank()], named, torch.stack(values), torch.stack(values) != 0)


def _difference(
    kind: int, ranks: Sequence[int], named: Named, values: torch.Tensor, differs: torch.Tensor
) -> Difference | None:
    count = int(differs.sum())
    if not count:
        return None
    first = int(differs.int().argmax())
    return Difference(kind, tuple(ranks), named[first][0], int(values[first]), count, socket.gethostname())


def _home(optimizer: HyperPOptimizer) -> torch.device:
    return next(iter(optimizer.exchange.bucket_of)).device


def _weights(optimizer: HyperPOptimizer) -> Iterator[Copies]:
    """Weights, by the ranks that replicate them: data-parallel ones, and tensor-parallel ones for what is not split."""
    from megatron.core import parallel_state

    ends: Named = []
    for domain in optimizer.domains:
        # Under --matrix-split a parameter has several routes.
        weights = {entry.name.partition("[")[0]: entry.parameter for entry in domain.routes}
        everywhere = [pair for pair in weights.items() if _is_replicated(pair[1])]
        split = [pair for pair in weights.items() if not _is_replicated(pair[1])]
        ends += [("the tied embedding", each) for each in weights.values() if getattr(each, "shared_embedding", False)]
        yield Copies(domain.both, lambda named=everywhere: list(named))  # type: ignore[misc]
        yield Copies(domain.data, lambda named=split: list(named))  # type: ignore[misc]
    # On every rank, so that the kinds are numbered alike.
    yield Copies(parallel_state.get_embedding_group() if ends else optimizer.domains[0].data, lambda: ends)


def _is_replicated(parameter: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks all hold it; expert-tensor-parallel ranks split what they have."""
    return partition_dim(parameter) == REPLICATED and not is_expert(parameter)


def _state(optimizer: HyperPOptimizer) -> Copies:
    """Masters and state of what tensor-parallel ranks replicate: all that have one data-parallel rank own the same."""

    def named() -> Named:
        return [
            (f"{entry.name} ({name})", tensor)
            for family in optimizer.families
            if _is_replicated(family.routes[0].parameter)
            for name, stacked in family.tensors().items()
            for entry, tensor in zip(family.routes, stacked, strict=True)
        ]

    return Copies(optimizer.domains[0].tensor, named)


def _everywhere(optimizer: HyperPOptimizer, balance: Balance | None, scales: DelayedScales | None) -> Named:
    """What every rank of the job holds the same bits of."""
    steps = torch.tensor([optimizer.steps_taken, optimizer.steps_skipped], device=_home(optimizer))
    named = [("the counts of steps", steps)]
    named += [] if balance is None else [("the experts' loads", balance.shares)]
    return named + ([] if scales is None else [("the delayed scales of FP8", scales.scales)])


def _owned(optimizer: HyperPOptimizer) -> Iterator[tuple[Route, torch.Tensor, torch.Tensor]]:
    """Route, weights and master of each piece that this rank owns."""
    for family in optimizer.families:
        for run in family.runs:
            yield from zip(family.routes[run.pieces], run.weights, run.of(family.master), strict=True)


def describe(told: Sequence[Sequence[Difference]]) -> str:
    """Say which rank differs from which in what: the first difference, of which the majority is taken to be right.

    Args:
        told: by rank, what each found.
    """
    kind, ranks = min((each.kind, each.ranks) for several in told for each in several)
    members = {rank: each for rank in ranks for each in told[rank] if (each.kind, each.ranks) == (kind, ranks)}
    first = members[ranks[0]]
    more = f" (and {first.count - 1} more)" if first.count > 1 else ""
    if kind == MASTERS:
        return f"rank {ranks[0]} on {first.host} uses weights that its fp32 master of {first.name}{more} does not have"
    value, votes = Counter(each.value for each in members.values()).most_common(1)[0]
    if 2 * votes <= len(members):
        return f"{_list(members)} hold different bits of {first.name}{more}"
    odd = {rank: each for rank, each in members.items() if each.value != value}
    others = {rank: each for rank, each in members.items() if each.value == value}
    return (
        f"{_list(odd)} {'holds' if len(odd) == 1 else 'hold'} other bits of {first.name}{more} than"
        f" {_list(others, hosts=False)}"
    )


def _list(members: dict[int, Difference], *, hosts: bool = True) -> str:
    """Name ranks, or count them if they are many."""
    if len(members) > LISTED:
        return f"{len(members)} ranks, {min(members)} the first,"
    names = [f"{rank} on {each.host}" if hosts else str(rank) for rank, each in members.items()]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)
