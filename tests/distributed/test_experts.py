"""Parameters of experts: owned, reduced and counted over expert-data-parallel ranks, also when an expert is idle."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run_distributed import run_distributed
from tests.toy import toy_config

STEPS = 3
# Rank and step at which its expert gets no token, hence no gradient.
IDLE = (3, 1)
EXPERTS, DENSE = "decoder.layers.0.mlp", "decoder.layers.0.self_attention"


SHAPES = {
    f"{DENSE}.linear_qkv": (64, 32),
    f"{DENSE}.linear_proj": (32, 32),
    f"{EXPERTS}.linear_fc1": (128, 32),
    f"{EXPERTS}.linear_fc2": (32, 64),
    "output_layer": (64, 32),
}


class StandIn(torch.nn.Module):
    """Parameters with the names of a one-layer model, whose gradients the test chooses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            module: torch.nn.Module = self
            for part in name.split("."):
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
            weight.allreduce = not name.startswith(EXPERTS)  # type: ignore[attr-defined]
            module.register_parameter("weight", weight)
        self.get_submodule("decoder.layers.0").layer_number = 1  # type: ignore[assignment]

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = dict(self.named_parameters())
        return torch.stack([(weights[name] * value).sum() for name, value in gradients.items()]).sum()


def gradient(name: str, shape: torch.Size, rank: int, step: int) -> torch.Tensor:
    seed = zlib.crc32(f"{name}/{rank}/{step}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train_experts(folder: str, overlap: bool) -> dict[str, Any]:
    """Take steps with two data-parallel ranks for each of two groups of experts; return norms and weights."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hyperp import device
    from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism
    from megatron_hyperp.training.setup import optimizer_of

    device.adapt_megatron()
    device.init_process_group(1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, create_gloo_process_groups=False)
    rank = int(os.environ["RANK"])
    fields = {"clip_grad": 0.0, "hidden_size": 32, "num_layers": 1, "ddp_bucket_size": 1 if overlap else None}
    config = toy_config("unused", Path(folder), **fields).resolve(world_size=4)
    core = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, calculate_per_token_loss=True)
    [chunk] = wrap_for_data_parallelism(core, [StandIn()], overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    optimizer = optimizer_of(config, [chunk])
    shapes = {name: parameter.shape for name, parameter in chunk.module.named_parameters()}
    norms = []
    for step in range(STEPS):
        chunk.zero_grad_buffer()
        names = [name for name in shapes if (rank, step) != IDLE or not name.startswith(EXPERTS)]
        chunk({name: gradient(name, shapes[name], rank, step) for name in names}).backward()
        launched = [bucket.launched for bucket in optimizer.exchange.buckets]
        # With overlap every reduction is on its way by now, but where an expert is idle.
        assert all(launched) == (overlap and (rank, step) != IDLE)
        chunk.finish_grad_sync()
        norms.append(optimizer.step()[1])
    optimizer.exchange.finish_param_sync()
    return {
        "norms": norms,
        "weights": {name: parameter.detach().clone() for name, parameter in chunk.module.named_parameters()},
        "experts": parallel_state.get_expert_model_parallel_rank(),
        "replicas": torch.distributed.get_process_group_ranks(parallel_state.get_expert_data_parallel_group()),
        "state_bytes": optimizer.state_bytes(),
        "buckets": len(optimizer.exchange.buckets),
        "lr": config.learning_rate().value,
    }


def reference(rank: int, replicas: list[int], lr: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What one rank computes from the summed gradients: weights, and each step's squared norms by parameter."""
    from megatron_hyperp.optim import AdamH, MuonH

    weights = dict(StandIn().named_parameters())
    hidden = [weight for name, weight in weights.items() if "output" not in name]
    optimizers = [
        MuonH(hidden, lr=lr, ns_dtype=torch.float32),
        AdamH([weights["output_layer.weight"]], lr=lr, init_std=0.02),
    ]
    for name, weight in weights.items():
        radius = 0.02 * math.sqrt(weight.numel()) if "output" in name else math.sqrt(len(weight) / 3)
        weight.data.mul_(radius / weight.data.norm())
    squares = []
    for step in range(STEPS):
        for name, weight in weights.items():
            ranks = replicas if name.startswith(EXPERTS) else range(4)
            contributing = [r for r in ranks if (r, step) != IDLE or not name.startswith(EXPERTS)]
            weight.grad = torch.stack([gradient(name, weight.shape, r, step) for r in contributing]).sum(dim=0)
        squares.append({name: float(weight.grad.square().sum()) for name, weight in weights.items()})
        for optimizer in optimizers:
            optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}, squares


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_experts_are_trained_and_counted_once(tmp_path: Path, overlap: bool) -> None:
    results = run_distributed(train_experts, 4, str(tmp_path), overlap)
    assert [result["experts"] for result in results] == [0, 1, 0, 1]
    squares: dict[int, list[dict[str, float]]] = {}
    for rank, result in enumerate(results):
        expected, squares[result["experts"]] = reference(rank, result["replicas"], result["lr"])
        for name, weight in result["weights"].items():
            assert torch.allclose(weight, expected[name], rtol=1e-4, atol=1e-5), (rank, name)
    for step in range(STEPS):
        # Dense parameters once, and the experts of both groups.
        dense = sum(value for name, value in squares[0][step].items() if not name.startswith(EXPERTS))
        experts = sum(v for group in (0, 1) for name, v in squares[group][step].items() if name.startswith(EXPERTS))
        for result in results:
            assert result["norms"][step] == pytest.approx(math.sqrt(dense + experts), rel=1e-6)
    # Each matrix has one owner, or several share its rows.
    whole = sum(rows * columns for rows, columns in SHAPES.values()) + 128 * 32 + 32 * 64
    head = 64 * 32
    # And a count for each row.
    rows = sum(rows for rows, _ in SHAPES.values()) + 128 + 32
    assert sum(result["state_bytes"] for result in results) == 4 * (2 * (whole - head) + 3 * head + rows)
    # Experts never share a bucket with what other ranks reduce.
    assert results[0]["buckets"] == 2
