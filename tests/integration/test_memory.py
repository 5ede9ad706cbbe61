"""Planned memory of activations against what real models keep for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.planning.activations import activation_bytes, layer_bytes
from tests.toy import MOE, SMALL, one_rank

UNFUSED = "--attention-backend local"
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


def resolve(flags: str) -> Config:
    return arguments.parse(f"{SMALL} {flags}".split(), description="").resolve()


def measure_kept() -> dict[str, int]:
    """Run forward passes of real models; return the bytes that are saved for the backward pass."""
    from megatron.core import parallel_state

    from megatron_hyperp import device
    from megatron_hyperp.model.build import build_balance, build_model, transformer_config
    from megatron_hyperp.training.setup import initialize_megatron

    device.adapt_megatron()
    result = {}
    for title, flags in KEPT.items():
        config = resolve(flags)
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
    with one_rank():
        return measure_kept()


@pytest.mark.parametrize("title", KEPT)
def test_activations(title: str, kept_bytes: dict[str, int]) -> None:
    """Within 10% of what one micro-batch keeps after its forward pass; recomputation adds a layer for the backward."""
    config = resolve(KEPT[title])
    again = 0.0
    if config.training.recompute_granularity != "none":
        kept_by_layer = layer_bytes(config) if config.training.recompute_granularity == "selective" else 0.0
        again = layer_bytes(config, mode="none") - kept_by_layer
    assert activation_bytes(config, 0, 1) - again == pytest.approx(kept_bytes[title], rel=0.1)
