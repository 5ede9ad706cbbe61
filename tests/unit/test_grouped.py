"""Grouped products of experts against a product per expert: values, gradients, idle experts."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp.moe.grouped import grouped_product

ROWS = {"even": [3, 3, 3], "uneven": [1, 7, 2], "idle first": [0, 4, 2], "idle last": [5, 1, 0], "one works": [0, 6, 0]}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("title", [*ROWS, "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_group_meets_its_own_matrix(title: str, dtype: torch.dtype) -> None:
    rows = ROWS.get(title, [0, 0, 0])
    tensors = [draw(sum(rows), 16, dtype=dtype), *(draw(8 + 0 * index, 16, dtype=dtype) + index for index in range(3))]
    gradient = draw(sum(rows), 8, dtype=dtype)
    results = []
    for exact in (False, True):
        # Exact is a product per expert, in float64.
        x, *weights = (item.clone().to(torch.float64 if exact else dtype).requires_grad_() for item in tensors)
        if exact:
            y = torch.cat([part @ weight.T for part, weight in zip(x.split(rows), weights, strict=True)])
        else:
            y = grouped_product(x, rows, weights)
        y.backward(gradient.to(y.dtype))
        results.append([y.detach(), x.grad, *(weight.grad for weight in weights)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, exact_value in zip(*results, strict=True):
        assert ours is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact_value, rtol=tolerance, atol=tolerance * 8)
    for count, weight_gradient in zip(rows, results[0][2:], strict=True):
        # An idle expert has a gradient, and it is zero: nobody waits for it in vain.
        assert bool(weight_gradient.any()) == (count > 0)


def test_the_stacked_copy_is_not_kept_for_the_backward_pass() -> None:
    weights = [draw(8, 16).requires_grad_() for _ in range(4)]
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_product(draw(8, 16), [2, 2, 2, 2], weights)
    held = {item.untyped_storage().data_ptr() for item in saved if item.ndim == 2 and len(item) == 8}
    assert {item.untyped_storage().data_ptr() for item in weights} <= held
    assert not [item for item in saved if item.ndim == 3]
