"""Dry runs of small layouts build what real ranks build."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_hyperp import arguments, device
from tests.run_distributed import run_distributed
from tests.toy import MOE, SMALL, TP2SP

LAYOUTS = {
    "one rank": (1, "--bf16 --momentum-dtype bf16"),
    "one rank, tied, components": (1, "--no-untie-embeddings-and-output-weights --matrix-split component"),
    "one rank, experts": (1, MOE),
    "DP2": (2, "--bf16"),
    "DP2, adamw": (2, "--optimizer adamw"),
    "DP2, experts": (2, MOE),
    "TP2, experts": (2, f"{MOE} {TP2SP}"),
    "PP2, interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "EP2": (2, f"{MOE} --expert-model-parallel-size 2"),
}


def config_of(flags: str, ranks: int) -> Any:
    return arguments.parse(f"{SMALL} {flags}".split(), description="").resolve(world_size=ranks)


def build_really(ranks: int) -> dict[str, tuple[Any, ...]]:
    """What ranks of gloo build, at the costs of CUDA."""
    from megatron.core import parallel_state

    from megatron_hyperp.model.build import build_balance
    from megatron_hyperp.parameters import named_parameters
    from megatron_hyperp.training.dry_run import ownership
    from megatron_hyperp.training.setup import build, initialize_megatron

    device.adapt_megatron()
    device.init_process_group(1)
    result = {}
    for title, (count, flags) in LAYOUTS.items():
        if count != ranks:
            continue
        config, report = config_of(flags, ranks), []
        initialize_megatron(config)
        with device.planning_for("cuda"):
            chunks, optimizer = build(config, build_balance(config), log=report.append)
        tensors: list[Any] = [parameter for chunk in chunks for parameter in chunk.module.parameters()]
        tensors += [parameter.main_grad for parameter in tensors]
        for bucket in optimizer.exchange.buckets:
            tensors += [bucket.weights, bucket.gradients]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
        result[title] = (
            {name: tuple(value.shape) for chunk in chunks for name, value in named_parameters(chunk)},
            sum(storages.values()),
            optimizer.state_bytes(),
            ownership(optimizer.domains),
            report,
        )
        parallel_state.destroy_model_parallel()
    return result


def build_dryly() -> dict[tuple[str, int], tuple[Any, ...]]:
    """The same, by dry runs, which need no other rank."""
    from megatron_hyperp.training.dry_run import build_rank

    result = {}
    for title, (count, flags) in LAYOUTS.items():
        for rank in range(count):
            built = build_rank(config_of(flags, count), count, rank)
            memory = built.memory
            result[title, rank] = (
                built.shapes,
                memory.weights + memory.gradients,
                memory.master + memory.momentum,
                built.ownership,
                built.report,
            )
    return result


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], tuple[Any, ...]]:
    return build_dryly()


@pytest.fixture(scope="module")
def real() -> dict[int, list[dict[str, tuple[Any, ...]]]]:
    return {ranks: run_distributed(build_really, ranks, ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("title", LAYOUTS)
def test_a_dry_run_builds_what_a_real_one_builds(
    title: str, built: dict[tuple[str, int], tuple[Any, ...]], real: dict[int, list[dict[str, tuple[Any, ...]]]]
) -> None:
    """Parameters, bytes of weights and gradients and of state, owners, and every line that the optimizer prints."""
    ranks, _ = LAYOUTS[title]
    for rank in range(ranks):
        assert built[title, rank] == real[ranks][rank][title]
