"""An expert that gets no token from some step on comes to rest; under any expert parallelism with the same bits."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tolerances
from tests.run_distributed import run_distributed
from tests.toy import EXPERTS, rows_of_run, toy_config

STEPS, LAST_TOKEN, LR = 2000, 100, 0.01
DEAD = "experts.local_experts.1."
FIELDS: dict[str, Any] = {
    **EXPERTS,
    **{"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_query_groups": 4, "clip_grad": 0.0, "lr": LR},
}


def gradient(name: str, parameter: torch.Tensor, step: int) -> torch.Tensor:
    if DEAD in name and step > LAST_TOKEN:
        return torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{step}".encode()))
    return torch.randn(parameter.shape, generator=generator)


def train_with_a_dead_expert(folder: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Take steps with chosen gradients; return weights by name, how far matrices moved, drift and idle matrices."""
    from megatron.core import parallel_state

    from megatron_hyperp import device
    from megatron_hyperp.model.build import build_balance
    from megatron_hyperp.parameters import named_parameters
    from megatron_hyperp.training.setup import build, initialize_megatron

    device.adapt_megatron()
    device.init_process_group(1)
    world_size = torch.distributed.get_world_size()
    config = toy_config("unused", Path(folder), **FIELDS, **fields).resolve(world_size=world_size)
    initialize_megatron(config)
    [chunk], optimizer = build(config, build_balance(config), log=lambda _: None)
    named = dict(named_parameters(chunk))
    # Experts are on one rank each, what data-parallel ranks replicate gets its gradient from the first one.
    first = parallel_state.get_data_parallel_rank() == 0
    moved = 0.0
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for name, parameter in named.items():
            if first or ".experts.local_experts." in name:
                parameter.main_grad.copy_(gradient(name, parameter, step))  # type: ignore[attr-defined]
        before = {name: each.detach().clone() for name, each in named.items() if DEAD in name and step > LAST_TOKEN}
        assert optimizer.step()[0]
        lengths = [float((named[name].detach() - value).norm() / value.norm()) for name, value in before.items()]
        moved += max(lengths, default=0.0)
    assert all(bool(each.isfinite().all()) for family in optimizer.families for each in family.tensors().values())
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
        "moved": moved,
        "drift": optimizer.radius_drift(),
        "idle": optimizer.idle_matrices(),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = run_distributed(train_with_a_dead_expert, 1, str(tmp_path_factory.mktemp("one")), {})
    return result  # type: ignore[no-any-return]


def test_an_expert_without_tokens_comes_to_rest(one: dict[str, Any]) -> None:
    # 1 / (1 - mu) steps' worth, less the last full one.
    assert 18 * LR < one["moved"] < 21 * LR
    assert one["drift"] < tolerances.RADIUS_DRIFT
    assert one["idle"] == 2
    assert all(bool(weight.isfinite().all()) for weight in one["weights"].values())


def test_it_rests_with_the_same_bits_under_expert_parallelism(one: dict[str, Any], tmp_path: Path) -> None:
    results = run_distributed(train_with_a_dead_expert, 2, str(tmp_path), {"expert_model_parallel_size": 2})
    for result in results:
        assert result["idle"] == 2
        for name, weight in result["weights"].items():
            assert torch.equal(weight, one["weights"][name]), name


def test_a_checkpoint_without_counts_resumes(corpus: str, tmp_path: Path) -> None:
    """As those of earlier versions are, and those of runs with ``--zero-gradients walk``."""
    fields = {"train_iters": 4, "num_layers": 2, "micro_batch_size": 4, "global_batch_size": 8}
    store = {"save": str(tmp_path / "store"), "save_interval": 2}
    whole = rows_of_run(1, corpus, tmp_path / "whole", zero_gradients="walk", **store, **fields)
    rows = rows_of_run(1, corpus, tmp_path / "resumed", load=str(tmp_path / "store" / "iter_0000002"), **fields)
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in whole if "loss" in row][2:]
