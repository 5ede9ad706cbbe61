"""Training with optional kernels is training without: attention, weight gradients added by a product, the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tolerances
from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.stand_ins import stand_in_for_apex
from tests.toy import EXPERTS, rows_of_training, toy_config

ITERATIONS = 5
UNFUSED = {"attention_backend": "local"}
SDPA = {"attention_backend": "sdpa"}
FUSED = {"gradient_accumulation_fusion": True}
LOSS = {"cross_entropy_loss_fusion": True, "bf16": True}
TIED = {"untie_embeddings_and_output_weights": False}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 30000}
WATCHED = {"stability_interval": ITERATIONS}
ALONE: dict[str, dict[str, Any]] = {
    "plain": WATCHED,
    "plain, tied": TIED,
    "plain, experts": EXPERTS,
    "plain, bf16": {"bf16": True},
    "sdpa": {**SDPA, **WATCHED},
    "sdpa, one head a group": {**SDPA, "num_query_groups": 4},
    "plain, one head a group": {"num_query_groups": 4},
    "sdpa, full": {**SDPA, "recompute_granularity": "full"},
    "sdpa, bf16": {**SDPA, "bf16": True},
    "fused": FUSED,
    "fused, full": {**FUSED, "recompute_granularity": "full"},
    "fused, tied": {**FUSED, **TIED},
    "fused, experts": {**FUSED, **EXPERTS},
    "fused, bf16": {**FUSED, "bf16": True},
    "loss, bf16": LOSS,
}
TOGETHER: dict[str, dict[str, Any]] = {
    "sdpa, TP2": {**SDPA, **TP2SP, **WATCHED},
    "sdpa, PP2": {**SDPA, **PP2},
    "loss, TP2": {**LOSS, **TP2SP},
    "plain, TP2, bf16": {**TP2SP, "bf16": True},
    "plain, TP2": TP2SP,
    "plain, DP2": OVERLAP,
    "plain, EP2": {**EXPERTS, "expert_model_parallel_size": 2},
    "plain, PP2, tied": {**PP2, **TIED},
    "fused, TP2": {**FUSED, **TP2SP},
    "fused, DP2": {**FUSED, **OVERLAP},
    "fused, EP2": {**FUSED, **EXPERTS, "expert_model_parallel_size": 2},
    "fused, PP2, tied": {**FUSED, **PP2, **TIED},
}


def train(prefix: str, folder: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return losses, gradient norms and indicators of a training, and the calls of the kernel."""
    apex = stand_in_for_apex()
    from megatron_hyperp import device
    from megatron_hyperp.training.logging import kind_of

    device.adapt_megatron()
    device.init_process_group(2)
    # The fused loss, uncompiled: the compiler asks CUDA for its device, which does not exist here.
    torch._dynamo.config.disable = True
    config = toy_config(prefix, Path(folder), train_iters=ITERATIONS, quiet=True, **{**UNFUSED, **fields})
    rows = rows_of_training(config)
    steps = [row for row in rows if "loss" in row]
    return {
        "loss": [row["loss"] for row in steps],
        "grad_norm": [row["grad_norm"] for row in steps],
        "stability": [row for row in rows if kind_of(row) == "stability"],
        "calls": apex.calls,
    }


@pytest.fixture(scope="module")
def trained(cases: Callable[..., Cases], corpus: str) -> Cases:
    """What came of each run on its first rank, and, under "last", on its last."""
    runs = {**{name: (1, fields) for name, fields in ALONE.items()}, **{n: (2, f) for n, f in TOGETHER.items()}}

    def run(title: str, folder: Path) -> dict[str, Any]:
        ranks, fields = runs[title]
        found = run_distributed(train, ranks, corpus, str(folder), fields, preload="tests.stand_ins.preload_apex")
        return {**found[0], "last": found[-1]}

    return cases(run)


KEPT = {"sdpa", "sdpa, TP2", "fused", "fused, TP2", "fused, EP2", "fused, bf16", "loss, TP2", "fused, tied"}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["loss"]) == ITERATIONS
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerances.LAYOUT_LOSS)
    assert found["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("title", "reference"),
    kept(
        [
            ("sdpa", "plain"),
            ("sdpa, one head a group", "plain, one head a group"),
            ("sdpa, full", "sdpa"),
            ("sdpa, TP2", "plain"),
            ("sdpa, PP2", "plain"),
            ("fused, tied", "plain, tied"),
        ],
        KEPT,
    ),
)
def test_losses_are_those_without(title: str, reference: str, trained: Cases) -> None:
    assert_close(trained[title], trained[reference])
    # It is another kernel, after all.
    assert title == "sdpa, full" or trained[title]["loss"] != trained[reference]["loss"]


@pytest.mark.parametrize("title", kept(["sdpa, bf16", "fused, bf16"], KEPT))
def test_bf16(title: str, trained: Cases) -> None:
    assert trained[title]["loss"] == pytest.approx(trained["plain, bf16"]["loss"], rel=1e-2)
    assert trained[title]["grad_norm"][0] == pytest.approx(trained["plain, bf16"]["grad_norm"][0], rel=1e-2)


@pytest.mark.parametrize(
    ("title", "reference"), kept([("loss, bf16", "plain, bf16"), ("loss, TP2", "plain, TP2, bf16")], KEPT)
)
def test_the_fused_loss_is_the_same(title: str, reference: str, trained: Cases) -> None:
    assert trained[title]["loss"][0] == pytest.approx(trained[reference]["loss"][0], rel=1e-6)
    assert trained[title]["grad_norm"][0] == pytest.approx(trained[reference]["grad_norm"][0], rel=1e-5)
    assert trained[title]["loss"] == pytest.approx(trained[reference]["loss"], rel=1e-2)


@pytest.mark.parametrize("title", ["sdpa", "sdpa, TP2"])
def test_indicators_see_through_the_kernel(title: str, trained: Cases) -> None:
    [expected], [found] = trained["plain"]["stability"], trained[title]["stability"]
    assert found["attention_z_per_layer"] == pytest.approx(expected["attention_z_per_layer"], rel=1e-4)


@pytest.mark.parametrize(
    ("title", "reference"),
    kept(
        [
            ("fused", "plain"),
            ("fused, full", "plain"),
            ("fused, experts", "plain, experts"),
            ("fused, TP2", "plain, TP2"),
            ("fused, DP2", "plain, DP2"),
            ("fused, EP2", "plain, EP2"),
            ("fused, PP2, tied", "plain, PP2, tied"),
        ],
        KEPT,
    ),
)
def test_gradients_that_the_kernel_adds_are_the_same_bits(title: str, reference: str, trained: Cases) -> None:
    for key in ("loss", "grad_norm"):
        assert trained[title][key] == trained[reference][key], key
    assert not trained[reference]["calls"]


@pytest.mark.parametrize(
    ("title", "linear_layers", "micro_batches"),
    kept(
        [
            # QKV, projection and two of the MLP in each of four layers, and the output layer.
            ("fused", 17, 4),
            ("fused, full", 17, 4),
            ("fused, tied", 17, 4),
            # Grouped experts and the router do not use it, the shared expert does.
            ("fused, experts", 17, 4),
            ("fused, TP2", 17, 4),
            ("fused, DP2", 17, 2),
            ("fused, EP2", 17, 2),
            ("fused, PP2, tied", 8, 4),
            ("fused, PP2, tied, last", 9, 4),
        ],
        KEPT,
    ),
)
def test_every_linear_layer_uses_the_kernel(title: str, linear_layers: int, micro_batches: int, trained: Cases) -> None:
    found = trained[title.removesuffix(", last")]
    calls = found["last"]["calls"] if title.endswith(", last") else found["calls"]
    assert calls == linear_layers * micro_batches * ITERATIONS


def disagree() -> str:
    """Let two ranks find other layers; return what is said of it."""
    from megatron_hyperp import device, libraries
    from megatron_hyperp.config import Config
    from megatron_hyperp.errors import UsageError
    from megatron_hyperp.training.agreement import agree

    device.init_process_group(1)
    agree(Config(), None)
    libraries.describe = lambda config: f"layers: kind {torch.distributed.get_rank()}"
    with pytest.raises(UsageError) as caught:
        agree(Config(), None)
    assert caught.value.same_on_all_ranks
    return str(caught.value)


def test_ranks_with_other_layers_do_not_train_together() -> None:
    for said in run_distributed(disagree, 2):
        assert said.startswith("rank 0 has layers kind 0, and rank 1 kind 1; install the same on all nodes")
