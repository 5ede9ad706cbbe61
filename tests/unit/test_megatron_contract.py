"""What is relied on of Megatron-Core's and torch's private and changing names: one test for each, and more for some."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import schedules as core_schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as core_random
from megatron.core.transformer.moe import moe_layer, moe_utils, token_dispatcher
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from megatron_hyperp import device
from megatron_hyperp.megatron_compat import contracts, experts, layers, schedules, specs
from megatron_hyperp.megatron_compat.fake_ranks import init_fake_process_group
from megatron_hyperp.megatron_compat.tensors import multiply_all_, storage_of
from megatron_hyperp.megatron_compat.versions import megatron_core_version
from megatron_hyperp.moe.grouped import GroupedLinear
from megatron_hyperp.optim.data_parallel import DataParallel
from megatron_hyperp.optim.distributed import HyperPOptimizer
from tests.toy import one_rank

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hyperp" / "megatron_compat"
release = Version(megatron_core_version.base_version)


@pytest.fixture(scope="module", autouse=True)
def _adapted() -> None:
    device.adapt_megatron()


@pytest.fixture
def _rank() -> Iterator[None]:
    with one_rank():
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()


def config(**fields: Any) -> TransformerConfig:
    fields = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "add_bias_linear": False} | fields
    return TransformerConfig(use_cpu_initialization=True, gated_linear_unit=True, **fields)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Every name of the table


@pytest.mark.parametrize("contract", [c for c in contracts.CONTRACTS if c.applies], ids=lambda c: c.name)
def test_name_exists_and_takes_what_is_passed(contract: contracts.Contract) -> None:
    contract.find()
    assert contract.fault() is None


def test_a_contract_says_what_is_missing() -> None:
    contract = contracts.Contract("torch.nn.Module.apply", "", passed=("function",))
    assert contract.fault() == "torch.nn.Module.apply takes (fn), not first (function)"
    contract = contracts.Contract("torch.nn.Module.apply", "", keywords=("deep",))
    assert contract.fault() == "torch.nn.Module.apply takes (fn), not deep"
    for name in ("torch.nn.gone", "gone.away"):
        with pytest.raises(AttributeError):
            contracts.find(name)


def test_versions_of_a_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, applies in (("0.16.1", False), ("0.17.1", True), ("0.18.0rc1", True), ("0.19", False)):
        monkeypatch.setattr(contracts, "megatron_core_version", Version(version))
        assert contracts.Contract("x", "", first="0.17", until="0.19").applies is applies


def test_the_page_has_the_table() -> None:
    """To write it anew: python -m megatron_hyperp.megatron_compat.contracts."""
    assert contracts.table() in (ROOT / "docs" / "megatron.md").read_text()


# On CPU


def test_cuda_is_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").cuda().device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.Event().record()
    assert type(torch.ones(1).type()) is str


def test_random_state_of_cuda_is_the_cpus() -> None:
    before = torch.get_rng_state()
    torch.cuda.manual_seed(7)
    kept = core_random._get_cuda_rng_state()
    drawn = torch.rand(3)
    core_random._set_cuda_rng_state(kept)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    torch.set_rng_state(before)


def test_split_sizes_are_numbers() -> None:
    for module in (moe_utils, token_dispatcher):
        assert isinstance(module.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True), np.ndarray)
    assert moe_utils.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


# Tensor parallelism


def test_reduce_sums_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 0.18.2 Megatron-Core's own returns what is not contiguous as it was."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(group.size()))
    group = SimpleNamespace(size=lambda: 2)
    for tensor in (draw(3, 4), draw(4, 3).T, draw(3, 8)[:, ::2]):
        assert torch.equal(mappings._reduce(tensor.clone(memory_format=torch.preserve_format), group), 2 * tensor)
    wide = draw(3, 8)[:, ::2]
    assert torch.equal(mappings._reduce(wide, group), 2 * wide)
    own = mappings._reduce.__wrapped__(wide, group)
    assert torch.equal(own, 2 * wide) is (release >= Version("0.19"))


@pytest.mark.usefixtures("_rank")
@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_layer_asks_for_its_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"input_is_parallel": True} if kind.startswith("Row") else {}
    made = getattr(layers, kind)(
        4, 6, config=config(), init_method=torch.nn.init.ones_, bias=False, skip_bias_add=True, **more
    )
    x = draw(2, 1, 4).requires_grad_()
    product, bias = made(x)
    torch.testing.assert_close(product, x @ made.weight.T)
    assert bias is None
    monkeypatch.setattr(made, "multiply", lambda multiply, x, weight: 3 * multiply(x, 2 * weight))
    torch.testing.assert_close(made(x)[0], 6 * product)


# Specs


def test_parts_of_a_dense_layer() -> None:
    mlp = get_gpt_layer_local_spec().submodules.mlp
    assert {"linear_fc1", "linear_fc2"} <= set(vars(specs.submodules_of(mlp)))


def test_parts_of_a_mixture() -> None:
    spec = copy.deepcopy(get_gpt_layer_local_spec(num_experts=2).submodules.mlp)
    parts = specs.submodules_of(spec)
    assert {"experts", "shared_experts", "router"} <= set(vars(parts))
    assert {"linear_fc1", "linear_fc2"} <= set(vars(specs.submodules_of(parts.shared_experts)))

    class Block:
        def __init__(self, submodules: Any) -> None:
            self.submodules = submodules

    changed = specs.with_module(spec, Block)
    made = changed() if isinstance(changed, functools.partial) else build_module(changed)
    assert type(made) is Block
    assert made.submodules is parts


# Experts


class Group:
    """Stands for a process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Recording(experts.Router):
    """A router that keeps the losses."""

    def attach_loss(self, probs: torch.Tensor, loss: torch.Tensor, group: Any) -> torch.Tensor:
        self.attached = loss, group
        return probs


def router(kind: str, **fields: Any) -> Recording:
    fields = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8} | fields
    settings = config(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.5, **fields)
    groups = SimpleNamespace(**dict.fromkeys(("tp", "cp", "tp_cp", "tp_dp_cp"), Group()))
    more = {} if release < Version("0.17") else {"is_mtp_layer": False}
    made = Recording(settings, groups, **more)
    made.set_layer_number(1)
    return made


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_router_hands_its_loss_over_and_logs_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", lambda counts, group: counts)
    logits = draw(6, 4).requires_grad_()
    made = router(kind)
    probs = draw(6, 4, seed=1)
    assert made.with_losses(probs, logits, 3, 2) is probs
    loss, group = made.attached
    assert loss.ndim == 0
    assert loss.requires_grad
    assert isinstance(group, Group)
    if release < Version("0.18"):
        assert not moe_utils.get_moe_layer_wise_logging_tracker()
    else:
        assert not contracts.find("megatron.core.transformer.moe.moe_logging.get_moe_metrics_tracker")().metrics


def test_router_without_a_loss() -> None:
    probs = draw(6, 4)
    assert router("none").with_losses(probs, draw(6, 4), 3, 2) is probs


def test_scores_for_losses_are_choices_and_probabilities() -> None:
    logits = draw(6, 4)
    chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(logits, 2, "softmax")
    torch.testing.assert_close(scores, torch.softmax(logits, dim=-1))
    assert torch.equal(chosen, torch.zeros(6, 4, dtype=torch.bool).scatter(1, logits.topk(2).indices, True))


def test_capacity_keeps_the_largest_gates() -> None:
    made = router("none", moe_expert_capacity_factor=1.0, moe_token_dispatcher_type="alltoall")
    probs = torch.zeros(4, 4)
    probs[:, :2] = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    kept, chosen = made.with_capacity(probs, probs > 0)
    # Four tokens with two experts each: each of the four experts takes two.
    assert chosen[:, :2].tolist() == [[False, True], [False, True], [True, False], [True, False]]
    assert torch.equal(kept, probs * chosen)


def test_scaler_attaches_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts.MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(3.0))
    gates, loss = torch.ones(2, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    attached = experts.MoEAuxLossAutoScaler.apply(gates, loss)
    assert torch.equal(attached, gates)
    attached.sum().backward()
    assert (gates.grad.tolist(), loss.grad.item()) == ([1.0, 1.0], 3.0)


def test_block_adds_no_shared_expert_that_is_not_passed() -> None:
    layer = SimpleNamespace(
        token_dispatcher=SimpleNamespace(combine_postprocess=lambda output: 2 * output),
        config=SimpleNamespace(moe_latent_size=None),
    )
    assert torch.equal(moe_layer.MoELayer.postprocess(layer, torch.ones(2), None), torch.full((2,), 2.0))


def test_grouped_experts_on_other_layers() -> None:
    groups = SimpleNamespace(ep=Group(), expt_tp=Group(), expt_dp=Group())
    settings = config(num_moe_experts=2, moe_ffn_hidden_size=8, activation_func=torch.nn.functional.silu)
    spec = experts.grouped_experts(GroupedLinear, fc1={"split": 0}, fc2={"split": 1})
    build = spec if isinstance(spec, functools.partial) else functools.partial(build_module, spec)
    made = build(2, settings, pg_collection=groups)
    assert (made.linear_fc1._split, made.linear_fc2._split) == (0, 1)
    matrices = [*made.linear_fc1.weights, *made.linear_fc2.weights]
    with torch.no_grad():
        for seed, matrix in enumerate(matrices):
            matrix.copy_(draw(*matrix.shape, seed=seed))
    x, gates = draw(5, 8), torch.rand(5, 1)
    output, bias = made(x, np.array([2, 3]), gates[:, 0])
    assert bias is None
    expected = []
    for rows, weights, first, second in ((x[:2], gates[:2], 0, 2), (x[2:], gates[2:], 1, 3)):
        gate, up = (rows @ matrices[first].T).chunk(2, dim=-1)
        expected.append((torch.nn.functional.silu(gate) * up * weights) @ matrices[second].T)
    torch.testing.assert_close(output, torch.cat(expected))


# Data parallelism and pipelines


def test_data_parallel_has_the_methods_of_its_base() -> None:
    [base] = DataParallel.__bases__
    own = {name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")}
    inherited = {"forward", "state_dict", "state_dict_for_save_checkpoint", "load_state_dict", "broadcast_params"}
    assert own - inherited <= set(vars(DataParallel))


def test_optimizer_defines_what_its_base_asks_for() -> None:
    assert MegatronOptimizer.__abstractmethods__
    assert not HyperPOptimizer.__abstractmethods__


@pytest.mark.parametrize("frees", [True, False])
def test_freed_output(frees: bool) -> None:
    output = torch.ones(3)
    core_schedules.deallocate_output_tensor(output, frees)
    assert output.numel() == (1 if frees else 3)


def test_interleaved_schedule_waits_before_it_frees() -> None:
    source = inspect.getsource(core_schedules.forward_backward_pipelining_with_interleaving)
    waits = re.search(
        r"if send_next_wait_handle is not None and config\.deallocate_pipeline_outputs:\s+\S+\.wait", source
    )
    assert bool(waits) is (release >= schedules.WAITS_FOR_SENDS)


@pytest.mark.parametrize(("version", "virtual", "frees"), [
    ("0.16.1", 1, True), ("0.16.1", 2, False), ("0.17.1", 2, False), ("0.18.2", 2, True), ("0.19.2", 4, True),
])  # fmt: skip
def test_interleaved_pipeline_keeps_outputs_that_are_being_sent(
    version: str, virtual: int, frees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert schedules.frees_pipeline_outputs(virtual, Version(version)) is frees
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    own = schedules.frees_pipeline_outputs(virtual)
    assert device.megatron_settings(virtual)["deallocate_pipeline_outputs"] is own


# torch


def test_multiply_all() -> None:
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    multiply_all_(tensors, 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 0.5], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_storage_of_views(home: str) -> None:
    buffer, other = torch.empty(8, device=home), torch.empty(8, device=home)
    assert storage_of(buffer[:4]) == storage_of(buffer[4:].view(2, 2)) != storage_of(other)


def test_fake_ranks_move_nothing() -> None:
    init_fake_process_group(3, 8)
    try:
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert (dist.get_rank(), dist.get_world_size(), tensor.tolist()) == (3, 8, [1.0, 1.0])
    finally:
        dist.destroy_process_group()


# No other module

# Of the standard library.
STANDARD = {"_replace", "_asdict", "_fields", "_exit", "_ArgumentGroup", "_actions", "_Unpickler"}


@functools.cache
def modules() -> dict[Path, ast.Module]:
    """The project's modules outside the package, its tests left out."""
    folders = ("megatron_hyperp", "tools", "examples", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if PACKAGE not in path.parents]
    return {path: ast.parse(path.read_text()) for path in paths}


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines, as functions, classes, variables or attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # A library's object would be changed, not defined.
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
    return found


def imported(tree: ast.Module) -> set[str]:
    """Names of other libraries that a module imports, in full."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("megatron", "torch")}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_no_other_module_imports_a_private_or_changing_name() -> None:
    confined = {contract.name for contract in contracts.CONTRACTS if contract.confined}
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in modules().items()
        for name in imported(tree)
        if name in confined or is_private(name)
    }
    assert not found


def test_no_other_module_uses_a_private_attribute_of_a_library() -> None:
    """One that no module of the project defines."""
    trees = modules()
    own = set().union(*map(defined, trees.values())) | STANDARD
    found = {
        f"{path.relative_to(ROOT)}: {node.attr}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own
    }
    assert not found
