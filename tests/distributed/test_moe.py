"""Mixture of experts: every layout trains the model that one rank trains, resharding and idle experts included."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.training.logging import read_metrics
from tests import tolerances
from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.toy import rows_of_run, toy_config

Runs = dict[str, dict[str, Any]]
ITERATIONS = 10
MOE = {"num_layers": 2, "ffn_hidden_size": 128, "moe_sparsity": 4, "moe_topk": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARED = {"moe_topk": 4, "moe_shared_expert": True, "moe_sparsity": 2}
EXACT = {"moe_balance_statistics": "exact"}
# Enough tokens for each expert to make its gradients of full rank: what Newton-Schulz makes of the rest is rounding.
SPARSE = {"num_experts": 64, "moe_router_topk": 4, "moe_sparsity": None, "moe_topk": None, "moe_ffn_hidden_size": 16}
SPARSE |= {"hidden_size": 32}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 30000}
LAYOUTS: dict[int, Runs] = {
    1: {
        "one": {},
        "one-shared": SHARED,
        "one-exact": EXACT,
        "one-recompute": {"recompute_granularity": "full"},
        "one-64": SPARSE,
        "one-z": {"moe_z_loss_coeff": 1e-3},
        "one-softmax": {"moe_gate": "softmax"},
        "one-unbalanced": {"moe_router_load_balancing_type": "none"},
        "one-aux": {"moe_router_load_balancing_type": "aux_loss"},
        "one-capacity": {"moe_expert_capacity_factor": 1.0},
        "one-bf16": {"bf16": True},
        "one-adamw": {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32},
    },
    2: {
        "ep2": EP2,
        "ep2-allgather": {**EP2, "moe_token_dispatcher_type": "allgather"},
        "dp2": {},
        "tp2": TP2,
        "tp2-etp2": {**TP2, "expert_tensor_parallel_size": 2},
        "tp2-z": {**TP2, "moe_z_loss_coeff": 1e-3},
        "tp2-aux": {**TP2, "moe_router_load_balancing_type": "aux_loss"},
        "pp2": PP2,
        # Two micro-batches on each of two ranks, where one rank takes four.
        "dp2-exact": EXACT,
        "ep2-64": {**EP2, **SPARSE, **OVERLAP},
        "ep2-shared": {**SHARED, "num_experts": 8, **EP2},
        "ep2-adamw": {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32, **EP2},
    },
    4: {
        "ep4": {"expert_model_parallel_size": 4},
        "ep2-dp2": EP2,
        "ep2-tp2": {**EP2, **TP2},
        "ep2-tp2-64": {**EP2, **TP2, **SPARSE},
        "ep2-pp2": {**EP2, **PP2},
        "ep2-tp2-component": {**EP2, **TP2, "matrix_split": "component"},
    },
}
LAYOUTS[1]["one-shared-8"] = {**SHARED, "num_experts": 8}
LAYOUTS[1]["one-component"] = {"matrix_split": "component"}
REFERENCES = {
    **dict.fromkeys(("ep2", "ep2-allgather", "dp2", "tp2", "tp2-etp2", "pp2", "ep4", "ep2-dp2", "ep2-tp2"), "one"),
    **dict.fromkeys(("ep2-pp2",), "one"),
    **{"dp2-exact": "one-exact", "ep2-64": "one-64", "ep2-tp2-64": "one-64"},
    **{"ep2-shared": "one-shared-8", "ep2-adamw": "one-adamw", "ep2-tp2-component": "one-component"},
}


RUNS = {name: (ranks, fields) for ranks, layouts in LAYOUTS.items() for name, fields in layouts.items()}
# What `make test` trains.
KEPT = {*LAYOUTS[1], "ep2", "tp2", "tp2-z", "pp2", "dp2-exact", "ep2-shared", "ep2-tp2"}


@pytest.fixture(scope="module")
def runs(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Rows of metrics by the name of a run."""

    def train(name: str, folder: Path) -> list[dict[str, Any]]:
        ranks, fields = RUNS[name]
        return rows_of_run(ranks, corpus, folder, **{**MOE, "train_iters": ITERATIONS, **fields})

    return cases(train)


def largest_difference(run: list[dict[str, Any]], reference: list[dict[str, Any]], key: str = "loss") -> float:
    assert len(run) == len(reference) == ITERATIONS
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(run, reference, strict=True))


@pytest.mark.parametrize("name", kept(REFERENCES, KEPT))
def test_layout_equals_one_rank(runs: Cases, name: str) -> None:
    reference = runs[REFERENCES[name]]
    assert largest_difference(runs[name], reference) < tolerances.LAYOUT_LOSS
    assert largest_difference(runs[name], reference, "grad_norm") < 100 * tolerances.LAYOUT_LOSS


@pytest.mark.parametrize("name", kept(REFERENCES, KEPT))
def test_the_global_balance_is_that_of_one_rank(runs: Cases, name: str) -> None:
    """The first batch has the same weights everywhere, so loads are equal and the loss is up to rounding."""
    first, expected = runs[name][0], runs[REFERENCES[name]][0]
    assert first["tokens_per_expert"] == expected["tokens_per_expert"]
    assert first["max_vio_per_layer"] == pytest.approx(expected["max_vio_per_layer"], rel=1e-6)
    for key in ("balance_loss", "router_z"):
        assert first[key] == pytest.approx(expected[key], rel=1e-6)
        # Thereafter a token that lies between two experts may go either way.
        assert largest_difference(runs[name], runs[REFERENCES[name]], key) < 10 * tolerances.LAYOUT_LOSS


@pytest.mark.parametrize(("name", "reference"), kept([("tp2-z", "one-z"), ("tp2-aux", "one-aux")], KEPT))
def test_other_losses_weigh_the_same_for_every_layout(runs: Cases, name: str, reference: str) -> None:
    """By their gradients: later a token that lies between two experts goes the other way."""
    for step in (0, 1):
        assert runs[name][step]["grad_norm"] == pytest.approx(runs[reference][step]["grad_norm"], rel=1e-5)
        assert runs[name][step]["loss"] == pytest.approx(runs[reference][step]["loss"], rel=1e-5)


def test_recomputation_counts_each_token_once(runs: Cases) -> None:
    assert largest_difference(runs["one-recompute"], runs["one"]) == 0.0
    assert largest_difference(runs["one-recompute"], runs["one"], "balance_loss") == 0.0


@pytest.mark.parametrize("name", kept(RUNS, KEPT))
def test_every_token_is_counted(runs: Cases, name: str) -> None:
    fields: dict[str, Any] = {**MOE, **RUNS[name][1]}
    topk = fields.get("moe_router_topk") or fields["moe_topk"] - bool(fields.get("moe_shared_expert"))
    for row in runs[name]:
        assert [sum(layer) for layer in row["tokens_per_expert"]] == [2048 * topk] * 2
        for layer, violation in zip(row["tokens_per_expert"], row["max_vio_per_layer"], strict=True):
            mean = sum(layer) / len(layer)
            assert violation == pytest.approx(max(layer) / mean - 1)


@pytest.mark.parametrize("name", kept([name for name in RUNS if "adamw" not in name], KEPT))
def test_experts_and_router_stay_on_their_spheres(runs: Cases, name: str) -> None:
    drifts = [row["radius_drift"] for row in runs[name]]
    assert 0 < max(drifts) < tolerances.RADIUS_DRIFT


@pytest.mark.parametrize("name", ["one", *(name for name in LAYOUTS[1] if name != "one")])
def test_every_kind_learns(runs: Cases, name: str) -> None:
    assert runs[name][-1]["loss"] < 0.95 * runs[name][0]["loss"]


def test_a_z_loss_keeps_router_logits_small(runs: Cases) -> None:
    assert runs["one-z"][-1]["router_z"] < runs["one"][-1]["router_z"]


def test_the_loss_balances(runs: Cases) -> None:
    assert runs["one"][-1]["max_vio"] < 0.5 * runs["one-unbalanced"][-1]["max_vio"]
    assert runs["one"][-1]["balance_loss"] < runs["one-unbalanced"][-1]["balance_loss"]


@pytest.mark.parametrize("name", ["one-z", "one-softmax", "one-capacity", "one-aux", "one-exact", "one-shared"])
def test_every_setting_changes_training(runs: Cases, name: str) -> None:
    assert largest_difference(runs[name], runs["one"]) > 1e-5


# A token's expert is chosen by its rank's router; with 64 experts and a batch of few tokens, most experts are idle.
IDLE = {**SPARSE, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 10}


def test_idle_experts_stall_nothing(corpus: str, tmp_path: Path) -> None:
    one = rows_of_run(1, corpus, tmp_path / "one", **{**MOE, **IDLE})
    four = rows_of_run(4, corpus, tmp_path / "four", **{**MOE, **IDLE, **EP2, **OVERLAP})
    assert any(0 in layer for row in one for layer in row["tokens_per_expert"])
    assert [row["skipped"] for row in four] == [0] * 10
    assert four[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert four[0]["tokens_per_expert"] == one[0]["tokens_per_expert"]
    assert all(row["radius_drift"] < tolerances.RADIUS_DRIFT for row in four)


MASKED, LAST_TOKEN, STEPS = 1, 50, 1500


def train_masked(prefix: str, folder: str) -> dict[str, Any]:
    """Train; one expert gets no token after step ``LAST_TOKEN``. Return metrics, and its largest momentum."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_hyperp import device
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    device.adapt_megatron()
    device.init_process_group(1)
    shape = {"hidden_size": 32, "num_layers": 2, "micro_batch_size": 4, "global_batch_size": 8, "seq_length": 32}
    config = toy_config(prefix, Path(folder), **{**MOE, **EP2, **shape, "train_iters": STEPS, "log_interval": 10})
    trainer = Trainer(config.resolve(world_size=2), load_tokenizer(config.data.tokenizer_model or ""), None)
    original = TopKRouter.gating

    def gating(self: Any, x: torch.Tensor) -> torch.Tensor:
        logits = original(self, x)
        if trainer.progress.iteration < LAST_TOKEN:
            return logits
        barred = torch.zeros(logits.shape[-1]).index_fill_(0, torch.tensor(MASKED), -1e4)
        return logits + barred

    TopKRouter.gating = gating
    trainer.train()
    largest = [
        float(momentum.abs().max())
        for family in trainer.optimizer.families
        for entry, momentum in zip(family.routes, family.state.get("momentum_buffer", ()), strict=False)
        if f".local_experts.{MASKED}." in entry.name
    ]
    finite = all(bool(tensor.isfinite().all()) for f in trainer.optimizer.families for tensor in f.tensors().values())
    drift = trainer.optimizer.radius_drift()
    trainer.close_reports()
    return {"rows": read_metrics(Path(folder)), "momenta": largest, "finite": finite, "drift": drift}


@pytest.mark.slow
def test_an_expert_without_tokens_for_long_harms_nothing(corpus: str, tmp_path: Path) -> None:
    """Its momentum falls by 0.95 a step, below 1e-30 and on."""
    results = run_distributed(train_masked, 2, corpus, str(tmp_path), seconds=600)
    rows = results[0]["rows"]
    # The four matrices of the expert in two layers, all on one rank.
    momenta = [value for result in results for value in result["momenta"]]
    print(f"\nloss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}, momenta {momenta}, drift {results[0]['drift']:.1e}")
    assert len(momenta) == 4
    assert all(0 < value < 1e-30 for value in momenta)
    assert all(
        layer[MASKED] == 0 for row in rows if row["iteration"] > LAST_TOKEN for layer in row["tokens_per_expert"]
    )
    assert len(rows) == STEPS // 10
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["skipped"] == 0
    assert all(result["finite"] and result["drift"] < tolerances.RADIUS_DRIFT for result in results)


RESHARDED: dict[str, tuple[int, dict[str, Any]]] = {
    "same": (4, {**EP2, **TP2}),
    "one": (1, {}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "tp2-etp2": (2, {**TP2, "expert_tensor_parallel_size": 2}),
    "ep2-pp2": (4, {**EP2, **PP2}),
}


@pytest.fixture(scope="module")
def resharded(cases: Callable[..., Cases], corpus: str) -> Cases:
    """Losses by iteration: of the run that saves after 5 of its 10 iterations, "whole", and of those that load it."""
    common = {**MOE, **SHARED, "num_experts": 8, "train_iters": 10}

    def train(name: str, folder: Path) -> dict[int, float]:
        if name == "whole":
            fields = {**EP2, **TP2, "save": str(folder / "store"), "save_interval": 5}
            rows = rows_of_run(4, corpus, folder, **{**common, **fields})
        else:
            ranks, fields = RESHARDED[name]
            assert made["whole"]
            load = str(made.folder("whole") / "store" / "iter_0000005")
            rows = rows_of_run(ranks, corpus, folder, **{**common, **fields, "load": load})
        return {row["iteration"]: row["loss"] for row in rows}

    made = cases(train, "resharded")
    return made


@pytest.mark.parametrize("name", kept(RESHARDED, {"one", "ep2-pp2"}))
def test_checkpoints_reshard_over_expert_parallel_ranks(resharded: Cases, name: str) -> None:
    whole, resumed = resharded["whole"], resharded[name]
    assert sorted(resumed) == [6, 7, 8, 9, 10]
    largest = max(abs(loss - whole[iteration]) / loss for iteration, loss in resumed.items())
    assert largest < (1e-12 if name == "same" else tolerances.RESHARDED_LOSS)


def build_weights(prefix: str, folder: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    from megatron_hyperp.parameters import named_parameters
    from tests.distributed.test_data_parallel import build_trainer

    trainer = build_trainer(prefix, folder, {**MOE, **overrides})
    return {
        name: parameter.detach().clone()
        for chunk in trainer.chunks
        for name, parameter in named_parameters(chunk)
        if ".experts." in name or "router" in name
    }


def test_initial_experts_are_the_same_bits_for_every_layout(corpus: str, tmp_path: Path) -> None:
    [expected] = run_distributed(build_weights, 1, corpus, str(tmp_path), {})
    ranks = run_distributed(build_weights, 2, corpus, str(tmp_path), EP2)
    assert set(expected) == {name for weights in ranks for name in weights}
    for weights in ranks:
        assert len(weights) == 2 * (4 * 2 + 1)
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), name
