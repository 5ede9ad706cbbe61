"""The HyperP optimizer of a Megatron-Core job, and the baselines it is compared with.

Parameters of one rule, shape and partition dimension form a family: one fp32 master copy, one momentum and one batch
of work, [count, rows, columns]. Gradients arrive reduced over the data-parallel ranks, each of which takes the same
step. Norms are of global matrices: one all-reduce of three numbers per matrix serves the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_hyperp import device
from megatron_hyperp.config import Config, width_multiplier
from megatron_hyperp.optim import sphere
from megatron_hyperp.optim.adamh import adam_direction_
from megatron_hyperp.optim.muonh import momentum_
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.routing import SPHERE_RULES, Route, describe, route
from megatron_hyperp.optim.tensor_parallel import Job, machine_of, orthogonalize_family
from megatron_hyperp.optim.tensor_parallel import describe as describe_strategies
from megatron_hyperp.parameters import REPLICATED, named_parameters

STATES = {
    "muonh": ("momentum_buffer",),
    "muon": ("momentum_buffer",),
    "adamh": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


@dataclass(slots=True)
class Family:
    """Parameters that are updated as one batch.

    Attributes:
        routes: its parameters, all alike but for their names.
        group: the ``param_groups`` entry with its learning rate and weight decay.
        master: fp32 weights [count, *local shape].
        state: fp32 optimizer state by name, each of the master's shape.
        radii: [count] float64; empty off the sphere.
    """

    routes: list[Route]
    group: dict[str, Any]
    master: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    radii: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def rule(self) -> str:
        """The update rule of all its parameters."""
        return self.routes[0].rule

    @property
    def sharded(self) -> bool:
        """Whether each tensor-parallel rank holds a part of every matrix."""
        return self.routes[0].partition_dim != REPLICATED

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The model's tensors."""
        return [entry.parameter for entry in self.routes]


class HyperPOptimizer(MegatronOptimizer):
    """MuonH, AdamH and AdamW (or a baseline) for this rank's part of the model.

    Args:
        routes: every trainable parameter with its rule.
        config: resolved config.
        tp_group: ranks that share sharded matrices.
        model_parallel_group: ranks that together hold the model once (tensor x pipeline).
    """

    # The learning-rate scheduler's view of the families; takes the place of the base class's property.
    param_groups: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(
        self,
        routes: Sequence[Route],
        config: Config,
        *,
        tp_group: dist.ProcessGroup,
        model_parallel_group: dist.ProcessGroup,
    ) -> None:
        # MegatronOptimizer's constructor takes a torch optimizer; the families below stand in its place.
        self.config = config.optimizer
        self.routes = list(routes)
        self.tp_group = tp_group
        self.grad_stats_parallel_group = model_parallel_group
        self.is_stub_optimizer = False
        self.steps_taken = 0
        self.steps_skipped = 0
        self.param_groups = []
        self.families = [self._family(alike, config) for alike in _alike(self.routes)]
        options = self.config
        gram = "gram" in (options.ns_form, options.ns_strategy)
        self.newton_schulz = NewtonSchulz(
            steps=options.ns_steps,
            coefficients=options.ns_coefficients,
            dtype=device.newton_schulz_dtype(options.ns_dtype, gram=gram),
            form=options.ns_form,
        )
        self.reload_model_params()

    def _family(self, routes: list[Route], config: Config) -> Family:
        first = routes[0]
        peak = config.learning_rate().value * first.lr_mult
        minimum = (self.config.min_lr or 0.0) * first.lr_mult
        # The fields that Megatron-Core's OptimizerParamScheduler reads and writes.
        group = {"max_lr": peak, "min_lr": minimum, "lr": peak, "wd_mult": float(first.decays), "weight_decay": 0.0}
        self.param_groups.append(group)
        master = torch.stack([entry.parameter.detach().float() for entry in routes])
        # State is created here and now: made at the first step it could differ between ranks and hang a checkpoint.
        state = {name: torch.zeros_like(master) for name in STATES[first.rule]}
        radii = torch.tensor([entry.radius for entry in routes if entry.radius is not None], dtype=torch.float64)
        return Family(routes, group, master, state, radii.to(master.device))

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the model's weights as new masters and put the sphere matrices exactly on their spheres."""
        del state_dict
        for family in self.families:
            torch.stack([parameter.detach().float() for parameter in family.parameters], out=family.master)
        for family, squares in zip(self._on_sphere(), self._squared_norms(), strict=True):
            family.master.mul_((family.radii / squares.sqrt()).to(family.master.dtype)[:, None, None])
        self._copy_to_model()

    def _on_sphere(self) -> list[Family]:
        return [family for family in self.families if family.rule in SPHERE_RULES]

    def _squared_norms(self) -> list[torch.Tensor]:
        """Return ||W||^2 of the global matrices of every family on the sphere."""
        families = self._on_sphere()
        squares = [(family.master * family.master).sum(dim=(1, 2), dtype=torch.float64)[:, None] for family in families]
        return [value[:, 0] for value in self._reduce_over_shards(families, squares)]

    def _reduce_over_shards(self, families: list[Family], values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sum [count, k] values of sharded families over the tensor-parallel ranks, all in one all-reduce."""
        sharded = [value for family, value in zip(families, values, strict=True) if family.sharded]
        if self.tp_group.size() == 1 or not sharded:
            return values
        summed = torch.cat(sharded)
        dist.all_reduce(summed, group=self.tp_group)
        parts = iter(summed.split([len(value) for value in sharded]))
        return [next(parts) if family.sharded else value for family, value in zip(families, values, strict=True)]

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Take one step with the reduced gradients in ``main_grad``.

        Returns:
            Whether it was taken (a non-finite gradient norm skips it, on every rank alike), the global gradient norm
            before clipping, and None for Megatron-Core's count of zeros.
        """
        gradients = [_main_gradients(family) for family in self.families]
        norm = self._global_norm(gradients)
        if not math.isfinite(norm):
            self.steps_skipped += 1
            return False, norm, None
        clip = self.config.clip_grad
        if clip and norm > clip:
            # One fused multiply over all gradients.
            torch._foreach_mul_(gradients, clip / norm)
        self.steps_taken += 1
        directions = [
            self._direction(family, gradient) for family, gradient in zip(self.families, gradients, strict=True)
        ]
        on_sphere = [(f, d) for f, d in zip(self.families, directions, strict=True) if f.rule in SPHERE_RULES]
        products = self._reduce_over_shards(
            [family for family, _ in on_sphere], [sphere.inner_products(family.master, d) for family, d in on_sphere]
        )
        for (family, direction), product in zip(on_sphere, products, strict=True):
            lr, decay = family.group["lr"], family.group["weight_decay"]
            sphere.step_(family.master, direction, product, radii=family.radii, lr=lr, weight_decay=decay)
        for family, direction in zip(self.families, directions, strict=True):
            if family.rule not in SPHERE_RULES:
                lr, decay = family.group["lr"], family.group["weight_decay"]
                family.master.mul_(1.0 - lr * decay).add_(direction, alpha=-lr * _flat_scale(family))
        self._copy_to_model()
        return True, norm, None

    def _direction(self, family: Family, gradients: torch.Tensor) -> torch.Tensor:
        """Update the family's state and return the directions along whose negative it moves."""
        options = self.config
        if family.rule in ("muonh", "muon"):
            update = momentum_(
                family.state["momentum_buffer"],
                gradients,
                momentum=options.muon_momentum,
                nesterov=options.muon_nesterov,
            )
            return orthogonalize_family(
                update,
                self.newton_schulz,
                group=self.tp_group,
                partition_dim=family.routes[0].partition_dim,
                strategy=options.ns_strategy,
            )
        return adam_direction_(
            family.state["exp_avg"],
            family.state["exp_avg_sq"],
            gradients,
            step=self.steps_taken,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
        )

    def describe_strategies(self) -> str:
        """Return the table of how each family's Newton-Schulz is shared over the tensor-parallel ranks."""
        jobs = [
            Job(
                len(f.routes),
                f.routes[0].shape[0],
                f.routes[0].shape[1],
                f.routes[0].partition_dim,
                self.tp_group.size(),
            )
            for f in self.families
            if f.rule in ("muonh", "muon")
        ]
        machine = machine_of(self.families[0].master)
        return describe_strategies(jobs, self.newton_schulz, machine, self.config.ns_strategy)

    def _global_norm(self, gradients: Sequence[torch.Tensor]) -> float:
        """Return the norm over all gradients of the model, each counted once."""
        total = torch.zeros((), dtype=torch.float64, device=device.device())
        for family, gradient in zip(self.families, gradients, strict=True):
            counted_elsewhere = not family.sharded and self.tp_group.rank() != 0
            copy_of_embedding = getattr(family.parameters[0], "shared", False)
            # A replica adds nothing, but what is not finite in it stays so (0 x inf is NaN) and skips the step too.
            share = 0.0 if counted_elsewhere or copy_of_embedding else 1.0
            total += share * (gradient * gradient).sum(dtype=torch.float64)
        dist.all_reduce(total, group=self.grad_stats_parallel_group)
        squared = total.item()
        return math.sqrt(squared) if math.isfinite(squared) else squared

    def _copy_to_model(self) -> None:
        for family in self.families:
            for parameter, master in zip(family.parameters, family.master, strict=True):
                parameter.detach().copy_(master)

    @torch.no_grad()
    def radius_drift(self) -> float:
        """Return the largest | ||W||/R - 1 | over all sphere matrices of the model; a collective call."""
        drifts = [
            sphere.relative_drift(family.master, family.radii, squares).max()
            for family, squares in zip(self._on_sphere(), self._squared_norms(), strict=True)
        ]
        largest = torch.stack([torch.zeros((), dtype=torch.float64, device=device.device()), *drifts]).max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.grad_stats_parallel_group)
        return float(largest)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop ``.grad``; the accumulated ``main_grad`` belongs to DistributedDataParallel."""
        del set_to_none
        for family in self.families:
            for parameter in family.parameters:
                parameter.grad = None

    def get_loss_scale(self) -> torch.Tensor:
        """Return 1: bf16 and fp32 need no loss scaling."""
        return torch.ones(1, device=device.device())

    def prepare_grads(self) -> bool:
        """Nothing to prepare: :meth:`step` reads ``main_grad`` itself. Returns that no overflow is known."""
        return False

    def step_with_ready_grads(self) -> bool:
        """Take :meth:`step`, return whether it was taken."""
        return self.step()[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; tensors travel in :meth:`sharded_state_dict`."""
        return {"steps_taken": self.steps_taken, "steps_skipped": self.steps_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over counters and tensors of a loaded :meth:`sharded_state_dict`; the model's weights follow."""
        self.steps_taken = state_dict["steps_taken"]
        self.steps_skipped = state_dict["steps_skipped"]
        for family in self.families:
            for name, stacked in _tensors(family).items():
                for index, entry in enumerate(family.routes):
                    stacked[index].copy_(state_dict["state"][entry.name][name])
        self._copy_to_model()

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return counters and state; each tensor carries its weight's own sharding, so any layout can load it.

        Args:
            model_sharded_state_dict: of the model, built from the same parameters.
            is_loading: unused; saving and loading need the same description.
            metadata: unused.
        """
        del is_loading, metadata
        parameters = [entry.parameter for family in self.families for entry in family.routes]
        sharded = get_param_id_to_sharded_param_map(model_sharded_state_dict, parameters)
        state: dict[str, dict[str, Any]] = {}
        index = 0
        for family in self.families:
            for position, entry in enumerate(family.routes):
                state[entry.name] = {
                    name: make_sharded_optimizer_tensor(
                        sharded[index], stacked[position], prefix=f"optimizer.state.{name}"
                    )
                    for name, stacked in _tensors(family).items()
                }
                index += 1
        return {**self.state_dict(), "state": state}


def _tensors(family: Family) -> dict[str, torch.Tensor]:
    return {"master": family.master, **family.state}


def _main_gradients(family: Family) -> torch.Tensor:
    """Return a copy of the gradients that DistributedDataParallel accumulated and reduced, fp32."""
    gradients: list[torch.Tensor] = [entry.parameter.main_grad for entry in family.routes]  # type: ignore[attr-defined]
    return torch.stack(gradients).float()


def _flat_scale(family: Family) -> float:
    """Factor on the step off the sphere: sqrt(d_out/d_in) for the Muon baseline, 1 for AdamW."""
    shape = family.routes[0].shape
    return math.sqrt(shape[0] / shape[1]) if family.rule == "muon" else 1.0


def _alike(routes: Sequence[Route]) -> list[list[Route]]:
    """Group routes into families, in an order that is the same on all tensor-parallel ranks."""
    families: dict[tuple[Any, ...], list[Route]] = {}
    for entry in routes:
        shared = getattr(entry.parameter, "shared", False)
        key = (entry.rule, entry.role, entry.shape, entry.partition_dim, entry.lr_mult, entry.decays, shared)
        families.setdefault(key, []).append(entry)
    return list(families.values())


def get_hyperp_optimizer(
    config: Config,
    model_chunks: Sequence[torch.nn.Module],
    *,
    log: Callable[[str], None] | None = None,
) -> HyperPOptimizer:
    """Build the optimizer of this rank's pipeline chunks; Megatron's process groups must exist.

    Args:
        config: resolved config; ``config.optimizer.optimizer`` picks HyperP or a baseline.
        model_chunks: chunks wrapped in Megatron-Core's DistributedDataParallel.
        log: receives the routing table and how Newton-Schulz is shared.

    Raises:
        ValueError: a parameter matches no rule, or two.
    """
    options = config.optimizer
    routes = route(
        [pair for chunk in model_chunks for pair in named_parameters(chunk)],
        optimizer=options.optimizer,
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        radius_scale=options.radius_scale,
        output_init_std=config.model.output_init_std,
        matrix_lr_mult=width_multiplier(config),
        embedding_lr_mult=options.embedding_lr_mult,
        adam_lr_mult=options.adam_lr_mult,
    )
    optimizer = HyperPOptimizer(
        routes,
        config,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        model_parallel_group=parallel_state.get_model_parallel_group(),
    )
    if log is not None:
        log(describe(routes))
        if optimizer.tp_group.size() > 1:
            log(f"Newton-Schulz over tensor-parallel ranks, predicted:\n{optimizer.describe_strategies()}")
    return optimizer
