"""The optimizer over data-parallel ranks: what each holds and sends, and that the number of ranks changes no step."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tolerances
from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.toy import rows_of_run, toy_config

TP2 = {"tensor_model_parallel_size": 2}


def build_trainer(prefix: str, folder: str, overrides: dict[str, Any]) -> Any:
    from megatron_hyperp import device
    from megatron_hyperp.training.loop import Trainer
    from megatron_hyperp.training.preflight import check

    config, tokenizer, *_ = check(toy_config(prefix, Path(folder), **overrides), int(os.environ["WORLD_SIZE"]))
    device.adapt_megatron()
    device.init_process_group(2)
    return Trainer(config, tokenizer, None)


def plant(name: str, parameter: torch.nn.Parameter, step: int, *, contributes: bool) -> None:
    """Set a local gradient that depends on the parameter's name alone, or zeros."""
    if not contributes:
        parameter.main_grad.zero_()  # type: ignore[attr-defined]
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{step}".encode()))
    parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]


def steps_with_equal_gradients(prefix: str, folder: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Take three steps with gradients that do not depend on the layout; return the weights and what was sent."""
    from megatron.core import parallel_state

    from megatron_hyperp.parameters import named_parameters, partition_dim

    trainer = build_trainer(prefix, folder, overrides)
    named = [pair for chunk in trainer.chunks for pair in named_parameters(chunk)]
    contributes = parallel_state.get_data_parallel_rank() == 0
    sent: Counter[str] = Counter()
    with counting(sent):
        for step in range(3):
            for chunk in trainer.chunks:
                chunk.zero_grad_buffer()
            for name, parameter in named:
                shard = parallel_state.get_tensor_model_parallel_rank() if partition_dim(parameter) >= 0 else 0
                plant(f"{name}/{shard}", parameter, step, contributes=contributes)
            trainer.chunks[0].start_grad_sync()
            trainer.chunks[0].finish_grad_sync()
            assert trainer.optimizer.step()[0]
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in named},
        "sent": {name: count / 3 for name, count in sent.items()},
        "elements": sum(parameter.numel() for _, parameter in named),
        "state_bytes": trainer.optimizer.state_bytes(),
        "padding": [bucket.padding for bucket in trainer.optimizer.exchange.buckets],
    }


class counting:
    """Count the elements that go into collectives, while it is entered."""

    NAMES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single", "broadcast")

    def __init__(self, sent: Counter[str]) -> None:
        self.sent = sent

    def __enter__(self) -> None:
        import torch.distributed as dist

        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.originals.items():
            setattr(dist, name, self._counted(name, function))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += max(argument.numel() for argument in args if isinstance(argument, torch.Tensor))
            return function(*args, **kwargs)

        return wrapper

    def __exit__(self, *_: Any) -> None:
        import torch.distributed as dist

        for name, function in self.originals.items():
            setattr(dist, name, function)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    # auto may choose another strategy for the fewer matrices of an owner, and with it other roundings.
    "tp2": (2, {**TP2, "ns_strategy": "all_to_all"}),
    "tp2-dp2": (4, {**TP2, "ns_strategy": "all_to_all"}),
}


@pytest.fixture(scope="module")
def stepped(cases: Callable[..., Cases], corpus: str) -> Cases:
    """What each rank of a layout returns."""

    def step(name: str, folder: Path) -> list[dict[str, Any]]:
        ranks, fields = LAYOUTS[name]
        return run_distributed(steps_with_equal_gradients, ranks, corpus, str(folder), fields)

    return cases(step)


@pytest.mark.parametrize(
    ("name", "reference"), kept([("dp2", "dp1"), ("dp4", "dp1"), ("tp2-dp2", "tp2")], {"dp2", "tp2-dp2"})
)
def test_weights_are_the_same_bits_for_any_number_of_data_parallel_ranks(
    stepped: Cases, name: str, reference: str
) -> None:
    for rank, result in enumerate(stepped[name]):
        expected = stepped[reference][rank % len(stepped[reference])]["weights"]
        assert result["weights"].keys() == expected.keys()
        for key, weight in result["weights"].items():
            assert torch.equal(weight, expected[key]), (rank, key)


@pytest.mark.parametrize("ranks", kept([2, 4], {2}))
def test_optimizer_state_falls_with_the_number_of_ranks(stepped: Cases, ranks: int) -> None:
    whole = stepped["dp1"][0]["state_bytes"]
    parts = [result["state_bytes"] for result in stepped[f"dp{ranks}"]]
    assert sum(parts) == whole
    assert max(parts) < 1.01 * whole / ranks


@pytest.mark.parametrize("ranks", kept([2, 4], {2}))
def test_gradient_traffic_is_half_of_an_all_reduce(stepped: Cases, ranks: int) -> None:
    for result in stepped[f"dp{ranks}"]:
        # A ring sends (p - 1)/p of a buffer in a reduce-scatter, and twice that in an all-reduce.
        all_reduce_of_all = 2 * result["elements"]
        assert result["sent"]["reduce_scatter_tensor"] / all_reduce_of_all < 0.505
        assert result["sent"]["all_gather_into_tensor"] / all_reduce_of_all < 0.505
        # The norm with three votes to stop, the inner products of the output layer, which all ranks share, and whether
        # its gradient is zero, and whether an update is not finite.
        assert result["sent"]["all_reduce"] == 4 + 4 + 1
        assert max(result["padding"]) < 0.01


def train_on_a_slow_machine(prefix: str, folder: str, overrides: dict[str, Any]) -> tuple[int, list[float]]:
    """Train where sharing a heavy matrix pays; return the ranks of a team and the losses."""
    from megatron_hyperp.optim.tensor_parallel import MACHINES, Machine
    from megatron_hyperp.training.logging import read_metrics

    MACHINES["cpu"] = Machine(flops=1e6, bytes_per_s=1e9, latency=1e-3, copy_bytes_per_s=1e9)
    trainer = build_trainer(prefix, folder, overrides)
    trainer.train()
    team = trainer.optimizer.domains[0].plan.team
    trainer.close_reports()
    trainer.leave_groups()
    return team, [row["loss"] for row in read_metrics(Path(folder)) if "loss" in row]


def test_matrices_shared_by_teams_train_the_same_model(corpus: str, tmp_path: Path) -> None:
    # Four matrices, of which QKV is most of the work.
    shape = {"num_layers": 1, "num_query_groups": 4, "kv_channels": 512, "ffn_hidden_size": 64, "train_iters": 5}
    cases = {"one": (1, {}), "dp4": (4, {}), "tp2-dp2": (4, TP2)}
    results = {
        name: run_distributed(train_on_a_slow_machine, size, corpus, str(tmp_path / name), {**shape, **overrides})[0]
        for name, (size, overrides) in cases.items()
    }
    assert {name: team for name, (team, _) in results.items()} == {"one": 1, "dp4": 2, "tp2-dp2": 2}
    for name in ("dp4", "tp2-dp2"):
        pairs = zip(results[name][1], results["one"][1], strict=True)
        assert max(abs(a - b) / b for a, b in pairs) < tolerances.LAYOUT_LOSS, name


FIFTY = {"train_iters": 50, "global_batch_size": 32, "micro_batch_size": 4}


@pytest.mark.slow
def test_fifty_steps_on_eight_ranks_equal_one_rank(corpus: str, tmp_path: Path) -> None:
    layout = {**TP2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    one = rows_of_run(1, corpus, tmp_path / "one", **FIFTY)
    eight = rows_of_run(8, corpus, tmp_path / "eight", **FIFTY, **layout)
    assert len(one) == len(eight) == 50
    largest = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(eight, one, strict=True))
    print(f"largest relative difference of the loss: {largest:.1e}")
    assert largest < tolerances.LAYOUT_LOSS


LONG = {
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "seq_length": 16, "micro_batch_size": 2},
    **{"global_batch_size": 4, "train_iters": 2000, "log_interval": 50, "bf16": True, "momentum_dtype": "bf16"},
}


@pytest.mark.slow
def test_radii_do_not_drift_over_two_thousand_steps_in_bf16(corpus: str, tmp_path: Path) -> None:
    rows = rows_of_run(2, corpus, tmp_path, **LONG)
    assert rows[-1]["iteration"] == 2000
    largest = max(row["radius_drift"] for row in rows)
    print(f"largest radius drift: {largest:.1e}")
    assert 0 < largest < tolerances.RADIUS_DRIFT
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
