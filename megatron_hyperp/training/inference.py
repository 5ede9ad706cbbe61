"""A model on one rank, its parameters from any source: logits of tokens, without a training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.config import CheckpointConfig, Config, LoggingConfig, ParallelConfig, TrainingConfig
from megatron_hyperp.parameters import named_parameters
from megatron_hyperp.training.setup import initialize_megatron

Logits = Callable[[torch.Tensor], torch.Tensor]


def inference_config(config: Config) -> Config:
    """Return a resolved config of the same model on one rank, in fp32, without what only a training needs."""
    config = copy.deepcopy(config)
    config.parallel, config.checkpoint, config.logging = ParallelConfig(), CheckpointConfig(), LoggingConfig()
    config.training = TrainingConfig(global_batch_size=1, train_iters=1, transformer_impl="local")
    config.optimizer.lr_warmup_iters, config.optimizer.lr_wsd_decay_iters, config.optimizer.min_lr = 0, None, None
    return config.resolve()


@contextmanager
def model_on_one_rank(config: Config, read: Callable[[str], torch.Tensor]) -> Iterator[Logits]:
    """Build the model, fill it, and yield its function from tokens [batch, sequence] to logits [batch, sequence, V].

    Args:
        config: of the model, resolved or not.
        read: returns a parameter by its name in the whole model.
    """
    from megatron.core import parallel_state

    from megatron_hyperp.model.build import build_balance, build_model, transformer_config

    config = inference_config(config)
    device.adapt_megatron()
    device.init_process_group(config.parallel.distributed_timeout_minutes)
    try:
        initialize_megatron(config)
        [chunk] = build_model(config, transformer_config(config), build_balance(config))
        fill(chunk, read)
        yield _logits_of(chunk.eval())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@torch.no_grad()
def fill(chunk: torch.nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Set every parameter of a chunk that is the whole model."""
    for name, parameter in named_parameters(chunk):
        parameter.copy_(read(name))


def _logits_of(model: Any) -> Logits:
    @torch.no_grad()
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(device.device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        result: torch.Tensor = model(tokens, positions, None)
        return result

    return logits
