"""The benchmark of the optimizer step: what it counts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.optimizer_step.measuring import COLLECTIVES, counted
from benchmarks.optimizer_step.others import cost_of_all_reduce, cost_of_redundant


def test_bytes_sent_are_those_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 4
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1 if group == "alone" else ranks)
    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: None)
    whole, part = torch.zeros(ranks, 10), torch.zeros(10)
    calls = {
        "all_reduce": (whole,),
        "all_gather": (list(whole), part),
        "all_gather_into_tensor": (whole, part),
        "reduce_scatter_tensor": (part, whole),
        "all_to_all_single": (whole, whole),
    }
    assert set(calls) == set(COLLECTIVES)
    for name, arguments in calls.items():
        with counted() as traffic:
            getattr(dist, name)(*arguments, group="all")
            getattr(dist, name)(*arguments, group="alone")
        assert traffic.collectives == 1, name
        assert traffic.sent == (2 if name == "all_reduce" else 1) * 160 * 3 / 4, name


def test_costs_of_the_baselines() -> None:
    n, m, ranks = 256, 1024, 2
    redundant, reduced = (cost(n, m, 1, ranks) for cost in (cost_of_redundant, cost_of_all_reduce))
    assert redundant.flops == 20 * n * n * m + 10 * n**3
    assert reduced.flops == 10 * n * n * m + 10 * n**3
    assert (redundant.sent, redundant.collectives) == (4 * n * m / 2, 1)
    assert (reduced.sent, reduced.collectives) == (5 * 4 * n * n, 6)
