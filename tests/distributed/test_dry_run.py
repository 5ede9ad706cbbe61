"""Dry runs of small layouts build what real ranks build."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_hyperp import arguments, device
from tests.cases import kept
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


def build_really(flags: str, ranks: int) -> tuple[Any, ...]:
    """What a rank of gloo builds, at the costs of CUDA."""
    from megatron_hyperp.model.build import build_balance
    from megatron_hyperp.parameters import named_parameters
    from megatron_hyperp.training.dry_run import ownership
    from megatron_hyperp.training.setup import build, initialize_megatron

    device.adapt_megatron()
    device.init_process_group(1)
    config, report = config_of(flags, ranks), []
    initialize_megatron(config)
    with device.planning_for("cuda"):
        chunks, optimizer = build(config, build_balance(config), log=report.append)
    tensors: list[Any] = [parameter for chunk in chunks for parameter in chunk.module.parameters()]
    tensors += [parameter.main_grad for parameter in tensors]
    for bucket in optimizer.exchange.buckets:
        tensors += [bucket.weights, bucket.gradients]
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
    return (
        {name: tuple(value.shape) for chunk in chunks for name, value in named_parameters(chunk)},
        sum(storages.values()),
        optimizer.state_bytes(),
        ownership(optimizer.domains),
        report,
    )


def build_dryly(flags: str, ranks: int, rank: int) -> tuple[Any, ...]:
    """The same, by a dry run, which needs no other rank."""
    from megatron_hyperp.training.dry_run import build_rank

    built = build_rank(config_of(flags, ranks), ranks, rank)
    memory = built.memory
    return (
        built.shapes,
        memory.weights + memory.gradients,
        memory.master + memory.momentum,
        built.ownership,
        built.report,
    )


@pytest.mark.parametrize("title", kept(LAYOUTS, {"one rank", "DP2", "TP2, experts", "PP2, interleaved", "EP2"}))
def test_a_dry_run_builds_what_a_real_one_builds(title: str) -> None:
    """Parameters, bytes of weights and gradients and of state, owners, and every line that the optimizer prints."""
    ranks, flags = LAYOUTS[title]
    for rank, expected in enumerate(run_distributed(build_really, ranks, flags, ranks)):
        assert build_dryly(flags, ranks, rank) == expected
