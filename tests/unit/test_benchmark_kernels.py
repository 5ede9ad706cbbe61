"""The benchmark of kernels: what it counts as kept, and that cases take turns."""

from __future__ import annotations

import torch

from benchmarks.kernels import run


def test_a_storage_is_kept_once() -> None:
    x = torch.randn(16, 64, requires_grad=True)
    # The square keeps its input; the product keeps two views of it, which are the same storage.
    assert run.bytes_kept(lambda: x.square()) == x.numel() * 4
    assert run.bytes_kept(lambda: x[:8] * x[8:]) == x.numel() * 4
    assert run.bytes_kept(lambda: x.exp().sum()) == x.numel() * 4


def test_cases_take_turns() -> None:
    calls: list[str] = []
    seconds = run.medians({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=1)  # type: ignore[misc]
    assert calls == list("ab") * (run.WARM_UPS + 1)
    assert seconds.keys() == {"a", "b"}


def test_ratios_are_of_what_is_replaced_over_what_replaces_it() -> None:
    row = run.ratios(["x"], {"old": 0.3, "new": 0.1}, {"old": 8 << 20, "new": 2 << 20})
    assert row == ["x", "300.0 ms", "100.0 ms", "3.00", "8.0 MiB", "2.0 MiB", "4.00"]
