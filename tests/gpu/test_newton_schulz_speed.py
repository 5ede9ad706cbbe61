"""Newton-Schulz on a GPU: its products run at a large share of a plain product's rate, in one run."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.optim.orthogonalize import NewtonSchulz

pytestmark = [pytest.mark.skipif(not device.has_cuda(), reason="needs a CUDA device"), pytest.mark.timing]

STEPS = 5


def seconds(function: object, repeats: int = 10) -> float:
    assert callable(function)
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


@pytest.mark.parametrize(("count", "rows", "columns"), [(8, 1024, 4096), (4, 3072, 12288), (64, 1024, 512)])
def test_rate(count: int, rows: int, columns: int) -> None:
    """Of the standard form in bf16. A third is what is left to elementwise work, which reads each matrix again."""
    x = torch.randn(count, rows, columns, device=device.device())
    ns = NewtonSchulz(dtype=torch.bfloat16, form="standard", steps=STEPS)
    small, large = sorted((rows, columns))
    # X X^T, A^2 and B X in each step.
    flops = STEPS * count * 2 * (2 * small**2 * large + small**3)
    side = 8192
    a = torch.randn(side, side, device=device.device(), dtype=torch.bfloat16)
    rate, best = flops / seconds(lambda: ns(x)), 2 * side**3 / seconds(lambda: a @ a)
    print(f"{count} x {rows} x {columns}: {rate / 1e12:.0f} TFLOP/s, {rate / best:.0%} of a plain product's")
    assert rate > best / 3
