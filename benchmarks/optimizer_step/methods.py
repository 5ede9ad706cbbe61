"""The ways to take a whole step that are compared, each on a stand-in for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.optimizer_step.measuring import Clock
from benchmarks.optimizer_step.others import (
    Replicated,
    all_reduce_per_iteration,
    cost_of_all_reduce,
    cost_of_redundant,
    redundant_per_matrix,
)
from benchmarks.optimizer_step.slices import Slice, config_of
from megatron_hyperp.config import Config
from megatron_hyperp.model.build import transformer_config
from megatron_hyperp.optim.buckets import Bucket
from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism
from megatron_hyperp.optim.distributed import HyperPOptimizer
from megatron_hyperp.optim.rules import base
from megatron_hyperp.optim.tensor_parallel import AUTO, MACHINES, STRATEGIES, Cost, Job, costs, taken
from megatron_hyperp.optimizer_options import routes_of
from megatron_hyperp.parameters import REPLICATED, mark_expert_parameters, named_parameters
from megatron_hyperp.planning.inventory import shapes
from megatron_hyperp.training.setup import optimizer_of


def _random(shape: tuple[int, ...], dim: int, seed: int) -> torch.Tensor:
    """Return this tensor-parallel rank's part of a random tensor that is the same for every layout."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    group = parallel_state.get_tensor_model_parallel_group()
    return whole if dim == REPLICATED else whole.chunk(group.size(), dim=dim)[group.rank()].contiguous()


def local_gradients(config: Config) -> list[torch.Tensor]:
    """Return gradients as this rank's backward pass would leave them; those of data-parallel ranks differ."""
    first_seed = 1_000_000 * (1 + parallel_state.get_data_parallel_group().rank())
    return [_random(item.shape, item.partition_dim, first_seed + number) for number, item in enumerate(shapes(config))]


def stand_in(config: Config) -> torch.nn.Module:
    """Return a module that has the parameters of a model, and does nothing."""
    root = torch.nn.Module()
    for seed, item in enumerate(shapes(config)):
        dim = item.partition_dim
        parameter = torch.nn.Parameter(_random(item.shape, dim, seed) * item.shape[-1] ** -0.5)
        parameter.tensor_model_parallel, parameter.partition_dim = dim != REPLICATED, dim  # type: ignore[attr-defined]
        module, (*path, leaf) = root, item.name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, parameter)
    mark_expert_parameters(root, config.parallel.expert_tensor_parallel_size)
    return root


class Method(Protocol):
    """A way to take the step.

    Attributes:
        parameters: of its stand-in.
        clock: has the seconds of its parts, "newton-schulz" and "exchange".
        newton_schulz: what Newton-Schulz should cost this rank.
        state_bytes: of fp32 weights and optimizer state on this rank.
    """

    parameters: list[torch.nn.Parameter]
    clock: Clock
    newton_schulz: list[Cost]
    state_bytes: int

    def load(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take this rank's own gradients, one for each parameter."""

    def step(self) -> None:
        """Reduce them and take the step."""


class Ours:
    """The package's optimizer, on its own data parallelism."""

    def __init__(self, config: Config) -> None:
        module = stand_in(config)
        self.parameters = list(module.parameters())
        self.clock = Clock()
        [self._chunk] = wrap_for_data_parallelism(
            transformer_config(config), [module], overlap_grad_reduce=False, overlap_param_gather=False
        )
        self._optimizer = optimizer_of(config, [self._chunk])
        self.newton_schulz = planned(self._optimizer, config.optimizer.ns_strategy)
        self.state_bytes = self._optimizer.state_bytes()
        self._reduce = self.clock.around("exchange", self._reduce_gradients)
        self._orthogonalize = self.clock.around("newton-schulz", base.orthogonalize_family)
        self._fill, self._send, self._receive = (
            self.clock.around("exchange", call)
            for call in (Bucket.fill_slot, Bucket.start_gather, Bucket.finish_gather)
        )

    def load(self, gradients: Sequence[torch.Tensor]) -> None:
        """Fill ``main_grad``."""
        self._chunk.zero_grad_buffer()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]

    def step(self) -> None:
        """Do what Megatron-Core's schedules do after the last backward pass, and the step."""
        with (
            patch.object(base, "orthogonalize_family", self._orthogonalize),
            patch.multiple(Bucket, fill_slot=self._fill, start_gather=self._send, finish_gather=self._receive),
        ):
            self._reduce()
            self._optimizer.step()

    def _reduce_gradients(self) -> None:
        self._chunk.finish_grad_sync()
        self._chunk.scale_gradients(1.0 / parallel_state.get_data_parallel_world_size())


class Others:
    """One of the ways of ``others.py``."""

    def __init__(
        self,
        config: Config,
        orthogonalize: Callable[[torch.Tensor, int, dist.ProcessGroup], torch.Tensor],
        cost_of: Callable[[int, int, int, int], Cost],
    ) -> None:
        module = stand_in(config)
        self.parameters = list(module.parameters())
        self.clock = Clock()
        self._stepper = Replicated(
            routes_of(config, named_parameters(module)),
            config.optimizer,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
            orthogonalize=orthogonalize,
            clock=self.clock,
        )
        self.newton_schulz = self._stepper.costs(cost_of)
        self.state_bytes = self._stepper.state_bytes()

    def load(self, gradients: Sequence[torch.Tensor]) -> None:
        """Fill the gradient buffer."""
        for own, gradient in zip(self._stepper.gradients, gradients, strict=True):
            own.copy_(gradient.view(own.shape))

    def step(self) -> None:
        """Take the step."""
        self._stepper.step()


def planned(optimizer: HyperPOptimizer, strategy: str) -> list[Cost]:
    """Return what the cost model says of this rank's families."""
    result = []
    for family in optimizer.families:
        first, newton_schulz = family.routes[0], family.rule.newton_schulz
        if newton_schulz is not None:
            job = Job(len(family.routes), first.shape[0], first.shape[1], family.share_dim, family.share_group.size())
            result.append(costs(job, newton_schulz)[taken(job, newton_schulz, MACHINES["cpu"], strategy)])
    return result


def methods_of(part: Slice, tensor_ranks: int) -> dict[str, Method]:
    """Return every method on its own stand-in, all with the same weights."""
    methods: dict[str, Method] = {
        strategy: Ours(config_of(part, tensor_ranks, "hyperp", strategy)) for strategy in (AUTO, *STRATEGIES)
    }
    config = config_of(part, tensor_ranks, "hyperp", AUTO)
    methods["redundant"] = Others(config, redundant_per_matrix, cost_of_redundant)
    if tensor_ranks > 1:
        methods["all-reduce"] = Others(config, all_reduce_per_iteration, cost_of_all_reduce)
    methods["AdamW"] = Ours(config_of(part, tensor_ranks, "adamw", AUTO))
    return methods
