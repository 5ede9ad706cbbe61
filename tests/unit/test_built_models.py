"""Models as Megatron-Core builds them, on the meta device: their size, and each parameter's name and role."""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.estimate import parameter_count
from megatron_hyperp.parameters import DISTINCT, REPLICATED, is_expert, partition_dim, role_of
from megatron_hyperp.planning.inventory import shapes, stage_parameters

PAPER_MOE = "--moe-sparsity 8 --moe-topk 8 --moe-shared-expert"
SMALL = "--depth 4 --aspect-ratio 16 --vocab-size 64 --train-iters 1 --global-batch-size 60 --seq-length 16"
MOE = f"{SMALL} --moe-sparsity 4 --moe-topk 4 --moe-shared-expert"


class Parameter(NamedTuple):
    """What a rank says of one of its parameters."""

    role: str
    shape: tuple[int, ...]
    expert: bool
    split: int


class Case(NamedTuple):
    """A model, and the rank that builds its part of it."""

    flags: str
    rank: int = 0
    ranks: int = 1


TP2SP = "--tensor-model-parallel-size 2 --sequence-parallel"
WHOLE = {
    "dense, paper's d8": Case("--depth 8 --vocab-size 32000"),
    "dense, paper's d24": Case("--depth 24 --vocab-size 32000"),
    "tied": Case(f"{SMALL} --no-untie-embeddings-and-output-weights"),
    "no QK-norm": Case(f"{SMALL} --no-qk-layernorm"),
    "mixture, paper's d8": Case(f"--depth 8 --vocab-size 32000 {PAPER_MOE}"),
    "mixture, paper's d24": Case(f"--depth 24 --vocab-size 32000 {PAPER_MOE}"),
    "mixture": Case(MOE),
    "mixture, nothing shared": Case(f"{SMALL} --moe-sparsity 4 --moe-topk 4"),
    "mixture, one expert a token": Case(f"{SMALL} --moe-sparsity 4 --moe-topk 1"),
    "mixture, Megatron's terms": Case(f"{SMALL} --num-experts 6 --moe-ffn-hidden-size 48 --moe-z-loss-coeff 0.1"),
}
PARTS = {
    **{f"EP rank {rank}": Case(f"{MOE} --expert-model-parallel-size 5", rank, 5) for rank in range(5)},
    **{
        f"PP and EP rank {rank}": Case(
            f"{MOE} --expert-model-parallel-size 3 --pipeline-model-parallel-size 2", rank, 6
        )
        for rank in range(6)
    },
    **{f"TP rank {rank}": Case(f"{MOE} {TP2SP}", rank, 2) for rank in range(2)},
    "expert TP": Case(f"{MOE} {TP2SP} --expert-tensor-parallel-size 2", 1, 2),
}


def build_all(cases: dict[str, Case]) -> dict[str, dict[str, Parameter]]:
    """Build each model on the meta device, among process groups that do not communicate; parameters by name."""
    from megatron_hyperp import device
    from megatron_hyperp.model.build import _build_chunk, build_balance, transformer_config
    from megatron_hyperp.parameters import is_expert, mark_expert_parameters, named_parameters, partition_dim
    from megatron_hyperp.training.dry_run import as_rank

    built: dict[str, dict[str, Parameter]] = {}
    for title, case in cases.items():
        config = arguments.parse(case.flags.split(), description="").resolve(world_size=case.ranks)
        with device.dry(), as_rank(config, case.rank, case.ranks):
            chunk = _build_chunk(config, transformer_config(config), None, build_balance(config))
        mark_expert_parameters(chunk, config.parallel.expert_tensor_parallel_size)
        found = list(named_parameters(chunk))
        assert len(dict(found)) == len(found)
        assert all(parameter.is_meta for _, parameter in found)
        built[title] = {
            name: Parameter(role_of(name, value), tuple(value.shape), is_expert(value), partition_dim(value))
            for name, value in found
        }
    return built


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Parameter]]:
    return build_all(WHOLE | PARTS)


@pytest.mark.parametrize("title", WHOLE)
def test_planned_parameters_are_those_that_are_built(title: str, built: dict[str, dict[str, Parameter]]) -> None:
    config = arguments.parse(WHOLE[title].flags.split(), description="").resolve()
    assert {item.name: item.shape for item in shapes(config)} == {
        name: item.shape for name, item in built[title].items()
    }
    assert {name: tuple(value.shape) for name, value in stage_parameters(config, 0)} == {
        name: item.shape for name, item in built[title].items()
    }


@pytest.mark.parametrize("title", ["PP and EP rank 0", "TP rank 0"])
def test_planned_parts_are_those_that_are_built(title: str, built: dict[str, dict[str, Parameter]]) -> None:
    case = PARTS[title]
    config = arguments.parse(case.flags.split(), description="").resolve(world_size=case.ranks)
    planned = {
        name: (tuple(value.shape), is_expert(value), partition_dim(value))
        for name, value in stage_parameters(config, 0)
    }
    assert planned == {name: (item.shape, item.expert, item.split) for name, item in built[title].items()}


@pytest.mark.parametrize("title", WHOLE)
def test_size_is_the_estimate_and_the_gains(title: str, built: dict[str, dict[str, Parameter]]) -> None:
    config = arguments.parse(WHOLE[title].flags.split(), description="").resolve()
    model, parameters = config.model, built[title].values()
    matrices = sum(math.prod(item.shape) for item in parameters if item.role != "vector")
    assert matrices == parameter_count(model, config.moe)
    # Two norms of a layer, those of queries and keys, the last one.
    gains = model.num_layers * 2 * (model.hidden_size + model.qk_layernorm * model.kv_channels) + model.hidden_size
    assert sum(math.prod(item.shape) for item in parameters if item.role == "vector") == gains


def test_the_papers_largest_mixture_has_22_9_billion_parameters(built: dict[str, dict[str, Parameter]]) -> None:
    parameters = built["mixture, paper's d24"]
    assert round(sum(math.prod(item.shape) for item in parameters.values()) / 1e9, 1) == 22.9
    experts = [name for name, item in parameters.items() if item.expert]
    assert len(experts) == 24 * 63 * 2
    assert sum(".shared_experts." in name for name in parameters) == 24 * 2
    assert parameters["decoder.layers.23.mlp.experts.local_experts.62.linear_fc1.weight"].shape == (3072, 3072)
    assert parameters["decoder.layers.0.mlp.router.weight"].shape == (63, 3072)


@pytest.mark.parametrize("title", [title for title in WHOLE if "mixture" in title])
def test_every_parameter_of_a_mixture_has_its_role(title: str, built: dict[str, dict[str, Parameter]]) -> None:
    config = arguments.parse(WHOLE[title].flags.split(), description="").resolve()
    moe, layers = config.moe, config.model.num_layers
    roles = collections.Counter(item.role for item in built[title].values())
    shared = bool(moe.moe_shared_expert_intermediate_size)
    assert roles == {
        "embedding": 1,
        "output": 1,
        "router": layers,
        # Attention, routed and shared experts.
        "hidden": layers * (2 + 2 * moe.num_experts + 2 * shared),
        "vector": layers * 4 + 1,
    }
    for name, item in built[title].items():
        assert item.expert == (".experts." in name), name
        assert not item.expert or item.split == REPLICATED


def names_of(whole: dict[str, Parameter], word: str = "") -> set[str]:
    return {name for name in whole if word in name}


def test_expert_parallel_ranks_name_their_experts_by_the_numbers_of_the_whole_model(
    built: dict[str, dict[str, Parameter]],
) -> None:
    whole = built["mixture"]
    for rank in range(5):
        part = built[f"EP rank {rank}"]
        # Three of the 15 routed experts, and all else.
        numbers = {int(name.split(".")[6]) for name in part if ".experts." in name}
        assert numbers == {3 * rank, 3 * rank + 1, 3 * rank + 2}
        assert {name: whole[name] for name in part} == part
        assert names_of(whole) - names_of(part) <= names_of(whole, ".experts.")
    parts = [names_of(built[f"EP rank {rank}"], ".experts.") for rank in range(5)]
    assert sorted(name for part in parts for name in part) == sorted(names_of(whole, ".experts."))


def test_layers_keep_their_numbers_under_pipeline_and_expert_parallelism(
    built: dict[str, dict[str, Parameter]],
) -> None:
    whole = built["mixture"]
    union: dict[str, Parameter] = {}
    for rank in range(6):
        part = built[f"PP and EP rank {rank}"]
        stage = rank // 3
        assert {int(name.split(".")[2]) for name in part if ".layers." in name} == {2 * stage, 2 * stage + 1}
        union |= part
    assert union == whole


def test_experts_stay_whole_under_tensor_parallelism(built: dict[str, dict[str, Parameter]]) -> None:
    """Unless they have tensor parallelism of their own."""
    whole, expert_tp = built["mixture"], built["expert TP"]
    for rank in range(2):
        part = built[f"TP rank {rank}"]
        assert names_of(part) == names_of(whole)
        for name, item in part.items():
            split = {"linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1, "embed": 0, "output": 0}
            dims = [dim for word, dim in split.items() if word in name and not item.expert]
            assert item.split == (dims[0] if dims else REPLICATED), name
            expected = [size // 2 if dim == item.split else size for dim, size in enumerate(whole[name].shape)]
            assert list(item.shape) == expected, name
    for name, item in expert_tp.items():
        if item.expert:
            assert item.split == (0 if "linear_fc1" in name else 1)
            assert math.prod(item.shape) * 2 == math.prod(whole[name].shape)
        else:
            assert item == built["TP rank 1"][name]
    assert DISTINCT not in {item.split for part in built.values() for item in part.values()}
