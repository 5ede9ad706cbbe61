"""What every layout must agree on before the first step, and what a step does with bad gradients."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.optim.soundness import STATE, WEIGHT
from tests import tolerances
from tests.cases import Cases, kept
from tests.run_distributed import run_distributed
from tests.toy import toy_config

TP2 = {"tensor_model_parallel_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"untie_embeddings_and_output_weights": False},
    "one group, wide head": {"num_query_groups": 2, "kv_channels": 32, "qk_layernorm": False},
    "bf16": {"bf16": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}


def build(prefix: str, folder: str, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return this rank's initial weights and masters with how they are split."""
    from megatron_hyperp.parameters import named_parameters, partition_dim
    from tests.distributed.test_data_parallel import build_trainer

    trainer = build_trainer(prefix, folder, fields)
    weights = {
        name: (parameter.detach().clone(), partition_dim(parameter))
        for chunk in trainer.chunks
        for name, parameter in named_parameters(chunk)
    }
    spheres = {
        entry.name: (family.master[index].clone(), entry.partition_dim, entry.radius)
        for family in trainer.optimizer.families
        for index, entry in enumerate(family.routes)
        if entry.radius is not None
    }
    return weights, spheres


@pytest.fixture(scope="module")
def built(cases: Callable[..., Cases], corpus: str) -> Cases:
    """What :func:`build` returns on each rank, by model and layout."""

    def compute(key: tuple[str, str], folder: Path) -> Any:
        model, layout = key
        ranks, fields = (1, {}) if layout == "one" else (2, LAYOUTS[layout])
        return run_distributed(build, ranks, corpus, str(folder), {**MODELS[model], **fields})

    return cases(compute)


def whole(name: str, parts: list[torch.Tensor], split: int) -> torch.Tensor:
    """Put the shards of tensor-parallel ranks together; gate and up rows of SwiGLU are sharded each."""
    if split < 0 or len(parts) == 1:
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])
    return torch.cat(parts, dim=split)


@pytest.mark.parametrize("model", kept(MODELS, {"untied", "tied"}))
@pytest.mark.parametrize("layout", kept(LAYOUTS, {"tp2", "pp2"}))
def test_initial_weights_are_the_same_bits_for_every_layout(built: Cases, model: str, layout: str) -> None:
    [(expected, _)] = built[model, "one"]
    ranks = [weights for weights, _ in built[model, layout]]
    seen = set()
    for name in {name for weights in ranks for name in weights}:
        parts = [weights[name][0] for weights in ranks if name in weights]
        # The last pipeline stage's copy of tied embeddings.
        origin = "embedding.word_embeddings.weight" if model == "tied" and name == "output_layer.weight" else name
        assert torch.equal(whole(name, parts, ranks[0].get(name, ranks[1].get(name))[1]), expected[origin][0]), name
        seen.add(origin)
    assert seen == set(expected)


@pytest.mark.parametrize("model", kept(MODELS, {"untied", "tied"}))
@pytest.mark.parametrize("layout", kept(["one", *LAYOUTS], {"one", "tp2", "pp2"}))
def test_sphere_matrices_start_on_their_spheres(built: Cases, model: str, layout: str) -> None:
    ranks = [spheres for _, spheres in built[model, layout]]
    names = {name for spheres in ranks for name in spheres}
    assert len(names) == 4 * 4 + (0 if model == "tied" else 1)
    for name in names:
        entries = [spheres[name] for spheres in ranks if name in spheres]
        matrix, radius = whole(name, [entry[0] for entry in entries], entries[0][1]), entries[0][2]
        norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        assert norm / radius == pytest.approx(1.0, abs=tolerances.RADIUS_DRIFT), name


ROLE_OF_BAD = {True: "output", False: "vector"}


def step_with_bad_gradients(prefix: str, folder: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Plant a NaN on the last rank alone, then an Inf, then step cleanly."""
    from megatron_hyperp import device
    from megatron_hyperp.training.loop import Trainer
    from megatron_hyperp.training.preflight import check

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    config, tokenizer, *_ = check(toy_config(prefix, Path(folder), **overrides), world_size)
    device.adapt_megatron()
    device.init_process_group(1)
    trainer = Trainer(config, tokenizer, None)
    batches = trainer._batches(trainer.train_set, 0)
    taken, faults = [], []
    for bad in (float("nan"), float("inf"), None):
        before = [family.master.clone() for family in trainer.optimizer.families]
        states = [value.clone() for family in trainer.optimizer.families for value in family.state.values()]
        trainer._forward_backward(batches, forward_only=False)
        if bad is not None and rank == world_size - 1:
            # The NaN in a sharded matrix, the Inf in a replicated gain that this rank does not count in the norm.
            family = next(f for f in trainer.optimizer.families if f.routes[0].role == ROLE_OF_BAD[math.isnan(bad)])
            family.blocks[0].of(family.routes[0].parameter.main_grad)[0, 0, 0] = bad
        success, _, _ = trainer.optimizer.step()
        faults.append(trainer.optimizer.fault and trainer.optimizer.fault.text)
        after = [family.master for family in trainer.optimizer.families]
        states_after = [value for family in trainer.optimizer.families for value in family.state.values()]
        unchanged = all(torch.equal(a, b) for a, b in zip(before + states, after + states_after, strict=True))
        taken.append((success, unchanged))
    counters = trainer.optimizer.state_dict()
    sizes = steps_of_any_size(trainer, batches)
    kinds = faults_of_state(trainer, batches)
    trainer.close_reports()
    trainer.leave_groups()
    return {"taken": taken, "faults": faults, "counters": counters, "sizes": sizes, "kinds": kinds}


def steps_of_any_size(trainer: Any, batches: Any) -> list[tuple[bool, float, float]]:
    """Step with gradients of any size and no older state: whether it was taken, the norm, how far spheres are left.

    Sizes are powers of two; the last is too large for Adam's squares, and not clipped.
    """
    optimizer, found = trainer.optimizer, []
    for power in (0, -110, -70, 60, 100, 100):
        trainer._forward_backward(batches, forward_only=False)
        optimizer.config = dataclasses.replace(optimizer.config, clip_grad=0.0 if len(found) == 5 else 1.0)
        for family in optimizer.families:
            for state in family.state.values():
                state.zero_()
            for run in family.runs:
                run.gradients.mul_(2.0**power)
        success, norm, _ = optimizer.step()
        found.append((success, norm / 2.0**power, optimizer.radius_drift()))
    return found


def faults_of_state(trainer: Any, batches: Any) -> list[tuple[int, str, bool]]:
    """Plant a NaN on the last rank, in a momentum and then in the model's weights; say what the steps found.

    The weights that follow from the optimizer's are whole again.
    """
    optimizer, last = trainer.optimizer, int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    optimizer.config = dataclasses.replace(optimizer.config, clip_grad=1.0)
    found = []
    family = next(family for family in optimizer.families if family.rule.name == "muonh")
    for tensor in (family.state["momentum_buffer"], family.routes[0].parameter.detach()):
        trainer._forward_backward(batches, forward_only=False)
        if last:
            tensor.view(-1)[0] = math.nan
        if tensor.ndim == 2:
            trainer._forward_backward(batches, forward_only=False)
        masters = [each.master.clone() for each in optimizer.families]
        assert not optimizer.step()[0]
        same = all(torch.equal(a, b.master) for a, b in zip(masters, optimizer.families, strict=True))
        found.append((optimizer.fault.kind, optimizer.fault.text, same))
        family.state["momentum_buffer"].nan_to_num_()
    optimizer.rewrite_weights()
    trainer._forward_backward(batches, forward_only=False)
    assert optimizer.step()[0]
    return found


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (2, TP2), (2, {}), (2, {"pipeline_model_parallel_size": 2})],
    ids=["one", "tp2", "dp2", "pp2"],
)
def test_a_non_finite_gradient_skips_the_step_on_every_rank(
    corpus: str, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    for result in run_distributed(step_with_bad_gradients, world_size, corpus, str(tmp_path), layout):
        assert result["taken"] == [(False, True), (False, True), (True, False)]
        assert result["counters"] == {"steps_taken": 1, "steps_skipped": 2, "counts_idle_steps": True}
        names = ("output_layer.weight", "norm")
        for name, text in zip(names, result["faults"], strict=False):
            assert re.search(rf"the gradient of .*{name}.* on rank {world_size - 1} is not finite", text), text
        assert result["faults"][2] is None
        check_sizes(result["sizes"])
        (state, of_state, same), (weight, of_weight, also) = result["kinds"]
        assert (state, weight, same, also) == (STATE, WEIGHT, True, True)
        assert re.match(rf"the optimizer's momentum_buffer of decoder.* on rank {world_size - 1} is not", of_state)
        assert re.match(rf"the weight decoder.* on rank {world_size - 1} is not finite", of_weight)


def check_sizes(sizes: list[tuple[bool, float, float]]) -> None:
    """Gradients of any finite size are taken if clipping brings them into range, and no matrix leaves its sphere."""
    for success, norm, drift in sizes[:-1]:
        assert success
        assert norm == pytest.approx(sizes[0][1], rel=0.5)
        assert drift < tolerances.RADIUS_DRIFT
    assert sizes[-1][0] is False
