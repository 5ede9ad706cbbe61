"""Steps of families take as many operations for many matrices as for few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.run_distributed import run_distributed
from tests.toy import toy_config


class StandIn(torch.nn.Module):
    """As many equal matrices as layers, with a gain each, under the names of a model."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("mlp.linear_fc1", (24, 16)), ("mlp.linear_fc2", (16, 12)), ("input_layernorm", (10,))):
            for layer in range(layers):
                module: torch.nn.Module = self
                for part in f"decoder.layers.{layer}.{name}".split("."):
                    if part not in dict(module.named_children()):
                        module.add_module(part, torch.nn.Module())
                    module = module.get_submodule(part)
                module.register_parameter("weight", torch.nn.Parameter(torch.randn(shape, generator=generator)))
        for layer in range(layers):
            self.get_submodule(f"decoder.layers.{layer}").layer_number = layer + 1  # type: ignore[assignment]


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def counted(action: Callable[[], Any]) -> dict[str, int]:
    with Operations() as operations:
        action()
    return dict(operations.counts)


RECIPES: list[dict[str, Any]] = [{}, {"matrix_split": "component"}, {"optimizer": "adamw"}]


def count_operations(folder: str, sizes: tuple[int, ...]) -> list[list[dict[str, dict[str, int]]]]:
    """Count the operations of a step and of the exchange around it, for each recipe for models of several sizes."""
    from megatron.core import parallel_state

    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    return [[operations_of(layers, folder, recipe) for layers in sizes] for recipe in RECIPES]


def operations_of(layers: int, folder: str, recipe: dict[str, Any]) -> dict[str, dict[str, int]]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism
    from megatron_hyperp.training.setup import optimizer_of

    config = toy_config("unused", Path(folder), hidden_size=16, num_layers=1, **recipe)
    core = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, calculate_per_token_loss=True)
    [chunk] = wrap_for_data_parallelism(core, [StandIn(layers)])
    optimizer = optimizer_of(config.resolve(world_size=dist.get_world_size()), [chunk])
    # The first step makes tables.
    optimizer.step()
    optimizer.zero_grad()
    for parameter in chunk.module.parameters():
        parameter.main_grad.fill_(1.0)  # type: ignore[attr-defined]
    result = {
        "reduce": counted(chunk.finish_grad_sync),
        "step": counted(optimizer.step),
        "reload": counted(optimizer.reload_model_params),
        "zero": counted(chunk.zero_grad_buffer),
    }
    assert all(bool(torch.isfinite(parameter).all()) for parameter in chunk.module.parameters())
    return result


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_does_not_go_matrix_by_matrix(tmp_path: Path, ranks: int) -> None:
    for result in run_distributed(count_operations, ranks, str(tmp_path), (8, 64)):
        for recipe, (few, many) in zip(RECIPES, result, strict=True):
            assert few == many, recipe
            assert 10 < sum(few["step"].values()) < 500, recipe
