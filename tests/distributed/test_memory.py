"""Planned memory of weights, gradients and the optimizer's state against what real ranks allocate."""

from __future__ import annotations

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.planning.memory import holdings, stage_memory
from tests.cases import kept
from tests.run_distributed import run_distributed
from tests.toy import MOE, SMALL, TP2SP

STATES = {
    "one rank": (1, ""),
    "bf16": (1, "--bf16 --momentum-dtype bf16"),
    "adamw": (1, "--optimizer adamw"),
    "components": (1, "--matrix-split component"),
    "tied": (1, "--no-untie-embeddings-and-output-weights"),
    "experts": (1, MOE),
    "DP2": (2, "--bf16"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2, adamw": (2, "--optimizer adamw"),
    "EP2": (2, f"{MOE} --expert-model-parallel-size 2"),
    "TP2, experts": (2, f"{MOE} {TP2SP}"),
}


def resolve(flags: str, ranks: int) -> Config:
    return arguments.parse(f"{SMALL} {flags}".split(), description="").resolve(world_size=ranks)


def measure_states(flags: str, ranks: int) -> tuple[int, int]:
    """Build model and optimizer; return bytes of weights and gradients in buffers, and of the optimizer's state."""
    from megatron_hyperp import device
    from megatron_hyperp.model.build import build_balance, build_model, transformer_config
    from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism
    from megatron_hyperp.training.setup import initialize_megatron, optimizer_of

    device.adapt_megatron()
    device.init_process_group(1)
    config = resolve(flags, ranks)
    initialize_megatron(config)
    core = transformer_config(config)
    chunks = wrap_for_data_parallelism(core, build_model(config, core, build_balance(config)))
    optimizer = optimizer_of(config, chunks)
    tensors = [bucket.weights for bucket in optimizer.exchange.buckets]
    tensors += [bucket.gradients for bucket in optimizer.exchange.buckets]
    for chunk in chunks:
        for parameter in chunk.module.parameters():
            tensors += [parameter, parameter.main_grad]  # type: ignore[attr-defined]
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
    return sum(storages.values()), optimizer.state_bytes()


@pytest.mark.parametrize("title", kept(STATES, {"bf16", "components", "experts", "DP2", "PP2", "EP2", "TP2, experts"}))
def test_weights_gradients_and_state(title: str) -> None:
    """Within 2% of what the fullest rank allocates; 10% is asked for."""
    ranks, flags = STATES[title]
    config = resolve(flags, ranks)
    found = run_distributed(measure_states, ranks, flags, ranks)
    stages = range(config.parallel.pipeline_model_parallel_size)
    planned = [stage_memory(config, ranks, stage, holdings(config, ranks, stage)) for stage in stages]
    assert max(item.weights + item.gradients for item in planned) == pytest.approx(max(b for b, _ in found), rel=0.02)
    assert max(item.master + item.momentum for item in planned) == pytest.approx(max(s for _, s in found), rel=0.02)
    assert max(item.states for item in planned) == pytest.approx(max(sum(pair) for pair in found), rel=0.02)
