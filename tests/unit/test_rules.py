"""Update rules: NorMuon against float64, the registry, a user's own, and what optim/ may import."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim import HyperPConfig, Part, StateEntry, UpdateRule, register
from megatron_hyperp.optim.options import RECIPES
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.ownership import partial_matrices, plan_ownership
from megatron_hyperp.optim.routing import route
from megatron_hyperp.optim.rules import REGISTERED, rule_class
from megatron_hyperp.optim.rules.normuon import NorMuonHRule, NorMuonRule
from megatron_hyperp.optim.sphere import inner_products, muonh_radius, step_
from megatron_hyperp.optim.tensor_parallel import MACHINES
from megatron_hyperp.optimizer_options import routes_of
from megatron_hyperp.planning.checkpoints import checkpoint_bytes
from megatron_hyperp.planning.inventory import stage_parameters
from tests import tolerances
from tests.toy import MOE, SMALL
from tests.unit.test_optimizers import gradients_of, initial, reference_newton_schulz, relative_difference

ROOT = Path(__file__).resolve().parents[2]
CUSTOM = f"{ROOT}/examples/custom_rule.py:RowBalanced"
FP32 = NewtonSchulz(dtype=torch.float32)


def reference_direction(gradients: list[np.ndarray], beta2: float = 0.95) -> list[np.ndarray]:
    """NorMuon's algorithm 1 in float64: momentum, Newton-Schulz, rows over the root of their second moment."""
    momentum, moment, result = np.zeros_like(gradients[0]), np.zeros((len(gradients[0]), 1)), []
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        update = reference_newton_schulz(0.95 * momentum + gradient)
        moment = beta2 * moment + (1 - beta2) * (update**2).mean(axis=1, keepdims=True)
        update = update / (np.sqrt(moment) + 1e-8)
        result.append(0.2 * math.sqrt(update.size) * update / np.sqrt((update**2).sum()))
    return result


def states(rule: UpdateRule, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros((1, *entry.of(rows, columns))) for name, entry in rule.state_entries().items()}


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64)])
def test_normuon_is_its_paper(shape: tuple[int, int]) -> None:
    rule, gradients = NorMuonRule(orthogonalizer=FP32), gradients_of(shape, 20)
    state = states(rule, *shape)
    assert state["row_exp_avg_sq"].shape == (1, shape[0], 1)
    for step, (gradient, expected) in enumerate(zip(gradients, reference_direction(gradients), strict=True), start=1):
        found = rule.direction_(torch.tensor(gradient[None], dtype=torch.float32), state, Part(step, *shape))
        assert relative_difference(found[0], expected) < tolerances.OPTIMIZER_FP32
    assert rule.scale(*shape) == 1.0


def test_normuonh_moves_on_the_sphere() -> None:
    shape, lr, radius = (48, 80), 0.02, muonh_radius(48)
    rule, gradients = NorMuonHRule(orthogonalizer=FP32), gradients_of(shape, 20)
    state, reference = states(rule, *shape), initial(shape, radius)
    weights = torch.tensor(reference[None], dtype=torch.float32)
    for step, (gradient, direction) in enumerate(zip(gradients, reference_direction(gradients), strict=True), start=1):
        found = rule.direction_(torch.tensor(gradient[None], dtype=torch.float32), state, Part(step, *shape))
        radii = torch.tensor([radius], dtype=torch.float64)
        step_(weights, found, inner_products(weights, found), radii=radii, lr=lr)
        reference = reference - lr * radius * direction / np.sqrt((direction**2).sum())
        reference = reference * radius / np.sqrt((reference**2).sum())
    assert relative_difference(weights[0], reference) < tolerances.OPTIMIZER_FP32


def test_a_matrix_of_zeros_stays_one() -> None:
    rule = NorMuonRule(orthogonalizer=FP32)
    assert not rule.direction_(torch.zeros(1, 4, 6), states(rule, 4, 6), Part(1, 4, 6)).any()


@pytest.mark.parametrize("name", REGISTERED)
def test_every_rule_declares_what_it_keeps(name: str) -> None:
    rule = REGISTERED[name].of(HyperPConfig(lr=1.0, momentum_dtype=torch.bfloat16), "mlp")
    assert rule == REGISTERED[name].of(HyperPConfig(lr=1.0, momentum_dtype=torch.bfloat16), "attention")
    state = {key: torch.zeros((2, *entry.of(6, 4)), dtype=entry.dtype) for key, entry in rule.entries().items()}
    assert rule.state_bytes(6, 4) == sum(tensor.nbytes for tensor in state.values()) // 2
    direction = rule.direction_(torch.randn(2, 6, 4), state, Part(1, 6, 4))
    assert direction.shape == (2, 6, 4)
    assert bool(direction.isfinite().all())
    assert (rule.newton_schulz is not None) == rule.needs_matrix


def test_steps_by_family_reach_the_rules() -> None:
    names = {"attention": "self_attention.linear_proj", "experts": "mlp.experts.local_experts.0.linear_fc2"}
    pairs = [(f"decoder.layers.0.{name}.weight", torch.nn.Parameter(torch.ones(4, 6))) for name in names.values()]
    routes = route(pairs, HyperPConfig(lr=1.0, ns_steps="7,experts=3"), tensor_parallel_size=1)
    found = [entry.rule.newton_schulz.steps for entry in routes if entry.rule.newton_schulz is not None]
    assert found == [7, 3]


def test_a_users_rule_comes_from_a_file() -> None:
    rule = rule_class(CUSTOM)
    assert rule.name == "row-balanced"
    assert rule_class(CUSTOM) is rule
    assert rule.of(HyperPConfig(lr=1.0, momentum=0.9), "mlp") == rule(momentum=0.9)  # type: ignore[call-arg]
    assert len((ROOT / "examples" / "custom_rule.py").read_text().splitlines()) < 60


BAD = {
    "sgd": r"'sgd' is unknown; give one of adamh, adamw, muon, muonh, normuon, normuonh, or FILE.py:CLASS",
    "nothing.py:Rule": "names no Python file; give FILE.py:CLASS",
    f"{ROOT}/examples/custom_rule.py:Rule": "custom_rule.py has no class Rule derived from UpdateRule",
}


@pytest.mark.parametrize("given", BAD)
def test_what_is_no_rule_is_one_line(given: str) -> None:
    with pytest.raises(UsageError, match=BAD[given]):
        rule_class(given)
    for words in (f"{SMALL} --optimizer-rule {given}", f"{SMALL} {MOE} --router-rule {given}"):
        with pytest.raises(UsageError, match=BAD[given]) as caught:
            arguments.parse(words.split(), description="").resolve()
        assert caught.value.same_on_all_ranks


def test_a_file_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('half written')")
    with pytest.raises(UsageError, match=r"broken.py raised RuntimeError \(half written\); fix the file"):
        rule_class(f"{tmp_path}/broken.py:Rule")


def test_names_are_unique() -> None:
    class Mine(NorMuonRule):
        pass

    with pytest.raises(ValueError, match="the name 'normuon' of Mine is that of NorMuonRule"):
        register(Mine)
    with pytest.raises(ValueError, match='"matrix" and "rows"'):
        StateEntry("columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer is 'sgd'; known are hyperp"):
        HyperPConfig(lr=1.0, optimizer="sgd")
    for wrong in ({"zero_gradients": "stop"}, {"matrix_split": "rows"}, {"lr_mults": {"head": 2.0}}):
        with pytest.raises(ValueError, match=repr(next(iter(wrong.values()))).strip("{}").split(":")[0]):
            HyperPConfig(lr=1.0, **wrong)  # type: ignore[arg-type]
    assert set(RECIPES) == {"hyperp", "muonh", "normuonh", "muon", "normuon", "adamw"}


def test_overrides_choose_rules_by_name() -> None:
    pairs = [(f"decoder.layers.{layer}.mixer.in_proj.weight", torch.nn.Parameter(torch.ones(4, 6))) for layer in (0, 1)]
    pairs.append(("decoder.layers.0.mixer.conv1d.weight", torch.nn.Parameter(torch.ones(4, 1, 3))))
    options = HyperPConfig(lr=1.0, overrides={"*.0.mixer.in_proj.weight": "adamw"})
    assert [entry.rule.name for entry in route(pairs, options, tensor_parallel_size=1)] == ["adamw", "muonh", "adamw"]
    with pytest.raises(
        ValueError, match=r"the rule muonh takes matrices, but .*conv1d.weight has the shape \(4, 1, 3\)"
    ):
        route(pairs, HyperPConfig(lr=1.0, overrides={"*conv1d*": "muonh"}), tensor_parallel_size=1)


def test_every_matrix_on_a_sphere_that_is_cut_is_summed() -> None:
    """Whatever its role: an embedding that an override puts on a sphere, cut by rows over two data-parallel ranks."""
    pairs = [("embedding.word_embeddings.weight", torch.nn.Parameter(torch.ones(8, 4)))]
    routes = route(pairs, HyperPConfig(lr=1.0, overrides={"*embeddings*": "adamh"}), tensor_parallel_size=1)
    plan = plan_ownership(routes, 2, MACHINES["cpu"])
    assert partial_matrices(routes, plan, 1, on_sphere=True) == [0]
    assert partial_matrices(routes, plan, 1, on_sphere=False) == []


def test_optim_knows_no_trainer_and_no_model() -> None:
    below = {"config", "model", "training", "moe", "resolve", "arguments", "optimizer_options", "planning", "convert"}
    for path in (ROOT / "megatron_hyperp" / "optim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parts = {module.split(".")[1] for module in modules if module.startswith("megatron_hyperp.")}
            assert not parts & below, (path.name, parts)


def test_a_users_rule_is_planned_with_its_state() -> None:
    words = f"{SMALL} --optimizer-rule".split()
    sizes = [checkpoint_bytes(arguments.parse([*words, rule], description="").resolve()) for rule in (CUSTOM, "muon")]
    config = arguments.parse([*words, CUSTOM], description="").resolve()
    shapes = [entry.block.shape for entry in routes_of(config, stage_parameters(config, 0)) if entry.role == "hidden"]
    # The same momentum, and four bytes for each row.
    assert sizes[0] - sizes[1] == 4 * sum(rows for rows, _ in shapes)
