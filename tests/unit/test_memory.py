"""Planned memory against what real models allocate and keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.planning.activations import activation_bytes, layer_bytes
from megatron_hyperp.planning.memory import holdings, stage_memory
from tests.run_distributed import run_distributed
from tests.toy import MOE, SMALL, TP2SP

UNFUSED = "--attention-backend local"
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
KEPT = {
    "dense": UNFUSED,
    "bf16": f"{UNFUSED} --bf16",
    "no QK-norm, long": f"{UNFUSED} --no-qk-layernorm --seq-length 256",
    "wide MLP": f"{UNFUSED} --ffn-hidden-size 2048 --micro-batch-size 4",
    "selective": "--recompute-granularity selective",
    "full": f"{UNFUSED} --recompute-granularity full",
    "fused attention": "",
    "fused attention, batch": "--micro-batch-size 4",
    "fused attention, bf16": "--bf16 --micro-batch-size 2",
    "fused attention, no QK-norm, long": "--no-qk-layernorm --seq-length 256",
    "fused attention, bf16, no QK-norm": "--bf16 --no-qk-layernorm",
    "fused attention, full": "--recompute-granularity full",
    "experts": MOE,
    "experts, bf16": f"{MOE} --bf16 --micro-batch-size 3",
}


def resolve(flags: str, ranks: int) -> Config:
    return arguments.parse(f"{SMALL} {flags}".split(), description="").resolve(world_size=ranks)


def measure_states(ranks: int) -> dict[str, tuple[int, int]]:
    """Build models and optimizers; return bytes of weights and gradients in buffers, and of the optimizer's state."""
    from megatron.core import parallel_state

    from megatron_hyperp import device
    from megatron_hyperp.model.build import build_balance, build_model, transformer_config
    from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism
    from megatron_hyperp.optim.distributed import get_hyperp_optimizer
    from megatron_hyperp.training.setup import initialize_megatron

    device.adapt_megatron()
    device.init_process_group(1)
    result = {}
    for title, (count, flags) in STATES.items():
        if count != ranks:
            continue
        config = resolve(flags, ranks)
        initialize_megatron(config)
        core = transformer_config(config)
        chunks = wrap_for_data_parallelism(core, build_model(config, core, build_balance(config)))
        optimizer = get_hyperp_optimizer(config, chunks)
        tensors = [bucket.weights for bucket in optimizer.exchange.buckets]
        tensors += [bucket.gradients for bucket in optimizer.exchange.buckets]
        for chunk in chunks:
            for parameter in chunk.module.parameters():
                tensors += [parameter, parameter.main_grad]  # type: ignore[attr-defined]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
        result[title] = (sum(storages.values()), optimizer.state_bytes())
        parallel_state.destroy_model_parallel()
    return result


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, tuple[int, int]]]]:
    return {ranks: run_distributed(measure_states, ranks, ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("title", STATES)
def test_weights_gradients_and_state(title: str, measured: dict[int, list[dict[str, tuple[int, int]]]]) -> None:
    """Within 2% of what the fullest rank allocates; 10% is asked for."""
    ranks, flags = STATES[title]
    config = resolve(flags, ranks)
    found = [result[title] for result in measured[ranks]]
    stages = range(config.parallel.pipeline_model_parallel_size)
    planned = [stage_memory(config, ranks, stage, holdings(config, ranks, stage)) for stage in stages]
    assert max(item.weights + item.gradients for item in planned) == pytest.approx(max(b for b, _ in found), rel=0.02)
    assert max(item.master + item.momentum for item in planned) == pytest.approx(max(s for _, s in found), rel=0.02)
    assert max(item.states for item in planned) == pytest.approx(max(sum(pair) for pair in found), rel=0.02)


def measure_kept() -> dict[str, int]:
    """Run forward passes of real models; return the bytes that are saved for the backward pass."""
    from megatron.core import parallel_state

    from megatron_hyperp import device
    from megatron_hyperp.model.build import build_balance, build_model, transformer_config
    from megatron_hyperp.training.setup import initialize_megatron

    device.adapt_megatron()
    device.init_process_group(1)
    result = {}
    for title, flags in KEPT.items():
        config = resolve(flags, 1)
        initialize_megatron(config)
        [chunk] = build_model(config, transformer_config(config), build_balance(config))
        result[title] = kept(chunk, config)
        parallel_state.destroy_model_parallel()
    return result


def kept(chunk: Any, config: Config) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch, length = config.training.micro_batch_size, config.model.seq_length
    tokens = torch.randint(config.model.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(tokens, torch.arange(length).expand(batch, length), None, labels=tokens)
    return sum(item.untyped_storage().nbytes() for pointer, item in saved.items() if pointer not in weights)


@pytest.fixture(scope="module")
def kept_bytes() -> dict[str, int]:
    [result] = run_distributed(measure_kept, 1)
    return result


@pytest.mark.parametrize("title", KEPT)
def test_activations(title: str, kept_bytes: dict[str, int]) -> None:
    """Within 10% of what one micro-batch keeps after its forward pass; recomputation adds a layer for the backward."""
    config = resolve(KEPT[title], 1)
    again = 0.0
    if config.training.recompute_granularity != "none":
        kept_by_layer = layer_bytes(config) if config.training.recompute_granularity == "selective" else 0.0
        again = layer_bytes(config, mode="none") - kept_by_layer
    assert activation_bytes(config, 0, 1) - again == pytest.approx(kept_bytes[title], rel=0.1)
