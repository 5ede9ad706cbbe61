"""Newton-Schulz of many matrices on CPU: runs that fit the cache, the same bits, never slower than single calls."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.optim.orthogonalize import NewtonSchulz, _chunks

SHAPES = [(300, 32, 128), (21, 128, 512)]
# Nothing about these is a multiple of a cache line, and the smallest leave PyTorch's fast kernels.
ODD_SHAPES = [(2000, 16, 5), (150, 37, 101), (150, 101, 37), (90, 10, 30)]
# Those that take seconds.
LARGE_SHAPES = [(21, 512, 128), (7, 256, 1024), (5, 512, 512), (70, 128, 128)]
LARGE_ODD_SHAPES = [(9, 513, 515)]


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.matrix)])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrices(count: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(0))


# What is cut, and that it does not show


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 15, 16, 100, 5000])
@pytest.mark.parametrize("size", [4, 320, 16384, 65536, 262144, 1 << 20, 1 << 21, 1 << 30])
def test_runs_tile_the_batch_and_fit(count: int, size: int) -> None:
    limit = device.newton_schulz_chunk()
    assert limit is not None
    runs = _chunks(count, size)
    assert runs[0][0] == 0
    assert runs[-1][1] == count
    assert all(left[1] == right[0] for left, right in itertools.pairwise(runs))
    # The last holds a rest, too. None is smaller than the others, so none is a matrix alone unless all are.
    assert all((high - low) * size <= max(limit, size) for low, high in runs[:-1])
    assert (runs[-1][1] - runs[-1][0]) * size < 2 * max(limit, size)
    assert all(high - low <= runs[-1][1] - runs[-1][0] for low, high in runs)


def test_one_batch_where_the_device_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    assert device.newton_schulz_chunk() is None
    assert _chunks(10**6, 10**6) == [(0, 10**6)]


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        *ODD_SHAPES,
        *(pytest.param(shape, marks=pytest.mark.matrix) for shape in LARGE_SHAPES + LARGE_ODD_SHAPES),
    ],
    ids=str,
)
def test_runs_have_the_bits_of_one_batch(
    shape: tuple[int, int, int], form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    newton_schulz, x = NewtonSchulz(dtype=torch.float32, form=form), matrices(*shape)
    if shape in ODD_SHAPES + LARGE_ODD_SHAPES:
        monkeypatch.setattr(device, "newton_schulz_chunk", lambda: x.numel() * 4 // 3)
    assert len(_chunks(len(x), x[0].numel() * 4)) > 1
    in_runs = newton_schulz(x)
    monkeypatch.setattr(device, "newton_schulz_chunk", lambda: None)
    at_once = newton_schulz(x)
    assert torch.equal(in_runs, at_once)
    # Sums over the result go through memory in one order, too.
    assert in_runs.stride() == at_once.stride()


def test_runs_keep_dtype_and_zeros() -> None:
    x = matrices(300, 128, 32).to(torch.bfloat16)
    x[150] = 0
    result = NewtonSchulz(dtype=torch.float32)(x)
    assert len(_chunks(300, 128 * 32 * 4)) > 1
    assert result.dtype == torch.bfloat16
    assert not result[150].any()
    assert torch.equal(result[149:152], NewtonSchulz(dtype=torch.float32)(x[149:152]))


# How fast


def speedup(count: int, rows: int, columns: int, repeats: int) -> float:
    """Time of single calls over that of one batch: the larger ratio of the medians and of the minima.

    Both are taken in turn, so that what else the machine does slows both. Still one statistic may be hit: another job
    that comes and goes moves medians, and one quiet moment moves a minimum.
    """
    newton_schulz, x = NewtonSchulz(dtype=torch.float32), matrices(count, rows, columns)
    actions: list[Callable[[], object]] = [lambda: [newton_schulz(matrix) for matrix in x], lambda: newton_schulz(x)]
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            if repeat:
                taken.append(time.perf_counter() - start)
    single, batch = times
    return max(statistics.median(single) / statistics.median(batch), min(single) / min(batch))


@pytest.mark.timing
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_batch_of_small_matrices_is_twice_as_fast_as_single_calls(threads: int) -> None:
    ratio = speedup(256, 32, 128, repeats=11)
    print(f"\n256 of 32 x 128, {threads} threads: a batch is {ratio:.2f} times as fast as single calls")
    assert ratio >= 2.0


@pytest.mark.timing
def test_a_batch_of_larger_matrices_is_not_slower_than_single_calls(threads: int) -> None:
    ratio = speedup(64, 128, 512, repeats=7)
    print(f"\n64 of 128 x 512, {threads} threads: a batch is {ratio:.2f} times as fast as single calls")
    # Clocks of a shared machine are good for a few percent.
    assert ratio >= 0.95
