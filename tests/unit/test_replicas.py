"""Fingerprints change with every bit, and differences between ranks are told."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperp.training import replicas
from megatron_hyperp.training.replicas import MASTERS, Difference, describe, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BLOCK", 4)
    tensor = torch.randn(3, 5).to(dtype)
    seen = {int(fingerprint(tensor))}
    content = tensor.view(-1).view(torch.uint8)
    for place in range(len(content)):
        for bit in range(8):
            content[place] ^= 1 << bit
            seen.add(int(fingerprint(tensor)))
            content[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(content)
    assert int(fingerprint(tensor)) in seen


def test_the_place_counts_and_the_memory_does_not() -> None:
    tensor = torch.randn(6, 4)
    assert fingerprint(tensor) != fingerprint(tensor.flip(0))
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    signs = tensor.clone()
    signs[0, 1] *= -1
    signs[4, 3] *= -1
    assert fingerprint(tensor) != fingerprint(signs)
    # One that begins between two words of 8 bytes.
    assert fingerprint(torch.cat([torch.zeros(1), tensor.view(-1)])[1:]) == fingerprint(tensor)
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert not fingerprint(torch.zeros(0))


def differences(values: dict[int, int], *, kind: int = 0, count: int = 1) -> list[list[Difference]]:
    """What ranks 0 to the largest say, of which those named hold copies with these fingerprints."""
    ranks = tuple(values)
    return [
        [Difference(kind, ranks, "W", values[rank], count, f"n{rank}")] if rank in values else []
        for rank in range(max(ranks) + 1)
    ]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (differences({0: 7, 1: 8}), "ranks 0 on n0, 1 on n1 hold different bits of W"),
        (differences({1: 7, 3: 8, 5: 8}), "rank 1 on n1 holds other bits of W than ranks 3, 5"),
        (differences({0: 1, 1: 2, 2: 8, 3: 8, 4: 8}), "ranks 0 on n0, 1 on n1 hold other bits of W than ranks 2, 3, 4"),
        (differences({0: 1, 1: 8, 2: 8}, count=4), "rank 0 on n0 holds other bits of W (and 3 more) than ranks 1, 2"),
        (
            differences({rank: int(rank == 3) for rank in range(20)}),
            "rank 3 on n3 holds other bits of W than 19 ranks, 0 the first,",
        ),
        (
            [[], [Difference(0, (0, 1), "V", 1, 1, "n0"), Difference(MASTERS, (1,), "W", 5, 1, "n0")]],
            "rank 1 on n0 uses weights that its fp32 master of W does not have",
        ),
    ],
)
def test_what_is_told(told: list[list[Difference]], line: str) -> None:
    assert describe(told) == line
