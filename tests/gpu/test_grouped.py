"""Grouped products of experts on a GPU: one kernel, against a product per expert in fp32."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.moe.grouped import grouped_product

pytestmark = pytest.mark.skipif(not device.has_cuda(), reason="needs a CUDA device")


@pytest.mark.parametrize("rows", [[128] * 4, [1, 300, 0, 83], [0, 0, 0, 64], [0, 0, 0, 0]])
def test_grouped_product(rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(rows), 256), *[(512, 256)] * 4]
    tensors = [torch.randn(shape, generator=generator).to(device.device(), torch.bfloat16) for shape in shapes]
    gradient = torch.randn(sum(rows), 512, generator=generator).to(device.device(), torch.bfloat16)
    x, *weights = (item.clone().requires_grad_() for item in tensors)
    y = grouped_product(x, rows, weights)
    y.backward(gradient)
    exact_x, *exact_weights = (item.float().requires_grad_() for item in tensors)
    parts = zip(exact_x.split(rows), exact_weights, strict=True)
    exact = torch.cat([part @ weight.T for part, weight in parts])
    exact.backward(gradient.float())
    pairs = [(y, exact), (x.grad, exact_x.grad)]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(weights, exact_weights, strict=True)]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        # bf16 has 8 bits: one rounding of sums of a few hundred products of size 1.
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-1)
