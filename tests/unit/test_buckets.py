"""Buckets: which parameters travel together, and where in the buffers they live; ranks that talk: tests/distributed."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Sequence
from typing import cast

import pytest
import torch
import torch.distributed as dist

from megatron_hyperp.optim.buckets import ALIGNMENT, PADDING, Bucket, Share, Shares, cut_into_buckets
from megatron_hyperp.parameters import Block

Parameters = list[torch.nn.Parameter]


def owned(parameter: torch.nn.Parameter, rank: int) -> list[Share]:
    return [Share(rank, Block.whole(parameter))]


def cut(parameter: torch.nn.Parameter, ranks: int) -> list[Share]:
    return [Share(rank, block) for rank, block in enumerate(Block.whole(parameter).cut(0, ranks))]


def random_model(seed: int, ranks: int) -> tuple[Parameters, dict[torch.nn.Parameter, list[Share]]]:
    """Matrices of a few sizes with owners in any order, and vectors that all ranks share."""
    numbers = random.Random(seed)
    shares: dict[torch.nn.Parameter, list[Share]] = {}
    for _ in range(numbers.randint(1, 60)):
        if numbers.random() < 0.3:
            parameter = torch.nn.Parameter(torch.empty(numbers.randint(1, 20)))
            shares[parameter] = cut(parameter, ranks)
        else:
            parameter = torch.nn.Parameter(torch.empty(numbers.choice([4, 8, 16]), 8))
            shares[parameter] = owned(parameter, numbers.randrange(ranks))
    return list(shares), shares


def padding(parameters: Sequence[torch.nn.Parameter], shares: Shares, ranks: int) -> float:
    """What equal slots waste, as a share of what they hold."""
    fill = [0] * ranks
    for share in (share for parameter in parameters for share in shares[parameter]):
        fill[share.rank] += share.block.numel
    return ranks * max(fill) / sum(fill) - 1.0


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.main_grad  # type: ignore[attr-defined]


def numel(parameters: Sequence[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


# Which parameters travel together


def test_without_a_size_there_is_one_bucket() -> None:
    parameters, shares = random_model(0, 4)
    assert padding(parameters, shares, 4) > PADDING
    assert [list(map(id, bucket)) for bucket in cut_into_buckets(parameters, shares, 4, None)] == [
        list(map(id, parameters))
    ]


@pytest.mark.parametrize("bucket_size", [1, 100, 1000, 10**9])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_buckets_keep_the_order_and_are_balanced(seed: int, ranks: int, bucket_size: int) -> None:
    parameters, shares = random_model(seed, ranks)
    buckets = cut_into_buckets(parameters, shares, ranks, bucket_size)
    assert list(map(id, itertools.chain(*buckets))) == list(map(id, parameters))
    assert all(buckets)
    # All but the last were closed, which takes the size and balance; an unbalanced rest joins the bucket before it.
    for bucket in buckets[:-1]:
        assert numel(bucket) >= bucket_size
        assert padding(bucket, shares, ranks) <= PADDING
    assert len(buckets) == 1 or padding(buckets[-1], shares, ranks) <= PADDING


def test_a_bucket_is_closed_as_soon_as_it_is_large_and_balanced() -> None:
    parameters = [torch.nn.Parameter(torch.empty(4, 4)) for _ in range(12)]
    shares = {parameter: owned(parameter, index % 3) for index, parameter in enumerate(parameters)}
    assert list(map(len, cut_into_buckets(parameters, shares, 3, 1))) == [3, 3, 3, 3]
    # 64 elements are four matrices, of which one rank has two: the bucket waits for the others'.
    assert list(map(len, cut_into_buckets(parameters, shares, 3, 64))) == [6, 6]


def test_an_unbalanced_rest_joins_the_bucket_before_it() -> None:
    parameters = [torch.nn.Parameter(torch.empty(4, 4)) for _ in range(7)]
    shares = {parameter: owned(parameter, index % 2) for index, parameter in enumerate(parameters)}
    assert list(map(len, cut_into_buckets(parameters[:6], shares, 2, 32))) == [2, 2, 2]
    # The seventh makes the last bucket unbalanced too, and so on: then all of them are one.
    assert list(map(len, cut_into_buckets(parameters, shares, 2, 32))) == [7]


# Where they live


class Rank:
    """Stands for one rank's view of a process group, for buckets that are laid out but do not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def bucket_on(rank: int, size: int, parameters: Parameters, shares: Shares) -> Bucket:
    return Bucket(parameters, shares, cast(dist.ProcessGroup, Rank(rank, size)))


def alone() -> dist.ProcessGroup:
    """A group of one rank, beside any default group."""
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=10))
    return cast(dist.ProcessGroup, group)


def example() -> tuple[Parameters, dict[torch.nn.Parameter, list[Share]]]:
    """For three ranks: matrices of the first and the last, and a vector and a matrix that all share, cut by columns."""
    shapes = [(5, 7), (10,), (3, 9), (8, 2), (4, 12)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    first, vector, last, also_first, columns = parameters
    team = [Share(rank, block) for rank, block in enumerate(Block.whole(columns).cut(1, 3))]
    shares = {first: owned(first, 0), vector: cut(vector, 3), last: owned(last, 2), also_first: owned(also_first, 0)}
    return parameters, {**shares, columns: team}


@pytest.mark.parametrize("rank", range(3))
def test_weights_and_gradients_live_in_the_slot_of_their_owner(rank: int) -> None:
    parameters, shares = example()
    before = [parameter.detach().clone() for parameter in parameters]
    bucket = bucket_on(rank, 3, parameters, shares)
    assert bucket.gradients.shape == bucket.weights.shape
    assert bucket.gradients.shape[0] == 3
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
    for parameter in parameters:
        whole, owner = len(shares[parameter]) == 1, shares[parameter][0].rank
        for tensor, buffer in ((parameter.data, bucket.weights), (gradient(parameter), bucket.gradients)):
            inside = tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            assert inside == whole
            if inside:
                offset, slot = tensor.storage_offset(), buffer.shape[1]
                assert owner * slot <= offset <= owner * slot + slot - tensor.numel()
                assert (offset - owner * slot) % ALIGNMENT == 0


def test_nothing_overlaps_in_the_buffers() -> None:
    """Distinct numbers put into every place are all still there."""
    parameters, shares = example()
    bucket = bucket_on(0, 3, parameters, shares)
    count = 1.0
    for parameter in parameters:
        numbers = torch.arange(count, count + parameter.numel())
        count += parameter.numel()
        gradient(parameter).copy_(numbers.view(parameter.shape))
    for copied in bucket._copied:
        copied.within(bucket.gradients).copy_(copied.gradients())
    held = bucket.gradients[bucket.gradients != 0]
    assert sorted(held.tolist()) == list(map(float, range(1, int(count))))
    for parameter in parameters:
        for share in shares[parameter]:
            values = share.block.of(gradient(parameter)).flatten()
            assert bool(torch.isin(values, bucket.gradients[share.rank]).all())


def address(tensor: torch.Tensor) -> int:
    return tensor.storage_offset()


def alike(count: int, shape: tuple[int, ...]) -> Parameters:
    return [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]


@pytest.mark.parametrize("shape", [(8, 16), (5, 7)], ids=["aligned", "padded"])
def test_alike_parameters_of_one_owner_are_a_stack_in_the_models_order(shape: tuple[int, int]) -> None:
    """They lie at equal distances, whatever comes between them and whoever else has some."""
    first, second, others = alike(5, shape), alike(4, shape), alike(9, (3, 4))
    mixed = [parameter for pair in zip(first + second, others, strict=True) for parameter in pair]
    shares = {parameter: owned(parameter, 0) for parameter in mixed}
    shares.update({parameter: owned(parameter, 1) for parameter in second})
    # The backward pass reaches the last parameter first.
    bucket = bucket_on(0, 2, mixed[::-1], shares)
    for stack in (first, second, others):
        stride = -(-stack[0].numel() // ALIGNMENT) * ALIGNMENT
        for tensors in ([p.data for p in stack], [gradient(p) for p in stack]):
            steps = {address(b) - address(a) for a, b in itertools.pairwise(tensors)}
            assert steps == {stride}
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert bucket.gradients[0].numel() >= sum(parameter.numel() for parameter in first + others)


def test_what_a_rank_shares_is_copied_stack_by_stack() -> None:
    """A hundred gains of one size are copied as often as one; each is where its rank looks for it."""
    gains, longer = alike(100, (10,)), alike(2, (13,))
    shares = {parameter: cut(parameter, 3) for parameter in gains + longer}
    bucket = bucket_on(1, 3, gains + longer, shares)
    assert len(bucket._copied) == 2 * 3
    for number, parameter in enumerate(gains + longer):
        gradient(parameter).copy_(torch.arange(parameter.numel()) + 100 * number)
    for copied in bucket._copied:
        copied.within(bucket.gradients).copy_(copied.gradients())
        copied.within(bucket.weights).copy_(copied.weights())
        for index, parameter in enumerate(copied.stack.parameters):
            block = copied.share.block
            assert torch.equal(copied.within(bucket.gradients)[index], block.of(gradient(parameter)))
            assert torch.equal(copied.within(bucket.weights)[index], block.of(parameter.detach()))
            # It is the parameter itself that is written when others' weights come back.
            copied.weights()[index].zero_()
            assert not block.of(parameter.detach()).any()


def test_parts_of_a_matrix_that_a_team_shares_are_stacked_too() -> None:
    """By columns, and by the rows of each group of a fused QKV."""
    blocks = [Block(2, 0, 3, 0, 4), Block(2, 3, 1, 0, 2), Block(2, 3, 1, 2, 2)]
    parameters = alike(4, (8, 4))
    shares = {p: [Share(rank, block) for rank, block in zip((0, 0, 1), blocks, strict=True)] for p in parameters}
    bucket = bucket_on(0, 2, parameters, shares)
    assert len(bucket._copied) == len(blocks)
    for copied in bucket._copied:
        expected = torch.stack([copied.share.block.of(parameter.detach()) for parameter in copied.stack.parameters])
        assert torch.equal(copied.weights(), expected)
        assert copied.within(bucket.weights).shape == expected.shape


def test_padding_is_what_the_slots_do_not_hold() -> None:
    parameters = [torch.nn.Parameter(torch.ones(ALIGNMENT, 3)), torch.nn.Parameter(torch.ones(ALIGNMENT))]
    bucket = bucket_on(
        0, 2, parameters, {parameters[0]: owned(parameters[0], 0), parameters[1]: owned(parameters[1], 1)}
    )
    assert bucket.gradients.shape == (2, 3 * ALIGNMENT)
    assert bucket.padding == pytest.approx(1 / 2)


def test_gradients_are_fp32_and_weights_keep_their_dtype() -> None:
    parameter = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    bucket = Bucket([parameter], {parameter: owned(parameter, 0)}, alone())
    assert (bucket.weights.dtype, bucket.gradients.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(parameter, before)


def test_one_rank_has_nothing_to_exchange() -> None:
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    bucket = Bucket(parameters, {parameter: cut(parameter, 1) for parameter in parameters}, alone())
    for parameter in parameters:
        gradient(parameter).fill_(2.0)
    before = bucket.weights.clone()
    bucket.start_reduce()
    bucket.finish_reduce()
    bucket.scale(0.5)
    assert all(bool((gradient(parameter) == 1.0).all()) for parameter in parameters)
    bucket.start_gather()
    bucket.finish_gather()
    assert torch.equal(bucket.weights, before)
    # An optimizer that writes a weight writes the buffer.
    parameters[0].data.zero_()
    assert not torch.equal(bucket.weights, before)


def test_a_bucket_knows_when_its_gradients_are_complete() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    bucket = Bucket(parameters, {parameter: cut(parameter, 1) for parameter in parameters}, alone())
    for _ in range(2):
        assert not bucket.complete
        bucket.ready(parameters[1])
        bucket.ready(parameters[1])
        assert not bucket.complete
        bucket.ready(parameters[0])
        assert bucket.complete
        assert not bucket.launched
        bucket.start_reduce()
        assert bucket.launched
        gradient(parameters[0]).fill_(1.0)
        bucket.zero()
        assert not bucket.launched
        assert not bucket.gradients.any()


def test_zeroing_reaches_gradients_outside_the_buffer() -> None:
    parameters, shares = example()
    bucket = bucket_on(1, 3, parameters, shares)
    for parameter in parameters:
        gradient(parameter).fill_(1.0)
    bucket.zero()
    assert not any(gradient(parameter).any() for parameter in parameters)


def test_only_the_owners_part_is_scaled() -> None:
    parameters, shares = example()
    bucket = bucket_on(1, 3, parameters, shares)
    for parameter in parameters:
        gradient(parameter).fill_(1.0)
    bucket.scale(3.0)
    for parameter in parameters:
        mine = [share.block for share in shares[parameter] if share.rank == 1]
        scaled = torch.ones(parameter.shape)
        for block in mine:
            block.of(scaled).fill_(3.0)
        assert torch.equal(gradient(parameter), scaled)
