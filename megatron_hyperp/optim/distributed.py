"""The HyperP optimizer of a Megatron-Core job, and the baselines it is compared with.

Each data-parallel rank keeps the fp32 weights and the state of what it owns (``ownership.py``), gets reduced gradients
for that alone, takes the step on it, and all ranks gather the new weights (``data_parallel.py``). What a rank owns of
one rule and shape forms a family: one fp32 master copy, one momentum and one batch of work, [count, rows, columns].
Norms are of global matrices: one all-reduce of four numbers per matrix serves the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_hyperp import device
from megatron_hyperp.megatron_compat.tensors import multiply_all_
from megatron_hyperp.optim import fading, sphere
from megatron_hyperp.optim.checkpoint import sharded_state, sharded_weights
from megatron_hyperp.optim.data_parallel import Exchange
from megatron_hyperp.optim.domains import Domain
from megatron_hyperp.optim.families import Family, families_of
from megatron_hyperp.optim.magnitudes import factors_in_range, rescale_, squared_norms
from megatron_hyperp.optim.observing import StepObserver, turned
from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.soundness import GRADIENT, UPDATE, Fault, any_on_a_rank, find_fault
from megatron_hyperp.optim.tensor_parallel import Job, machine
from megatron_hyperp.optim.tensor_parallel import describe as describe_strategies
from megatron_hyperp.parameters import DISTINCT

# Largest norm of the clipped gradients: squares of their elements, and sums of them in momenta, are in range in fp32.
LARGEST_NORM = 1e19
# Below this, elements of a gradient's squared norm may have been denormal.
SMALLEST_SQUARED_NORM = 1e-20


# Whether a checkpoint has the counts of steps without a gradient; those of earlier versions do not.
COUNTS_IDLE_STEPS = "counts_idle_steps"


def without_idle_steps(state: ShardedStateDict) -> None:
    """Leave the counts of steps without a gradient out of a sharded state of the optimizer, in place."""
    for entries in state["state"]:
        entries.pop(fading.IDLE_STEPS, None)


class HyperPOptimizer(MegatronOptimizer):
    """The step of every rule for what this rank owns of its part of the model.

    Args:
        domains: every trainable parameter with its rule and owner.
        options: learning rates, clipping, how ranks share Newton-Schulz.
        exchange: the buckets of gradients and weights, laid out by the same owners.
    """

    # The learning-rate scheduler's view of the families; takes the place of the base class's property.
    param_groups: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(
        self,
        domains: Sequence[Domain],
        options: HyperPConfig,
        *,
        exchange: Exchange,
    ) -> None:
        # MegatronOptimizer's constructor takes a torch optimizer; the families below stand in its place.
        self.config = options
        self.domains = list(domains)
        # Counted once: a domain looks through the plan of all ranks.
        self._places = {
            on_sphere: [len(domain.places(on_sphere=on_sphere)) for domain in self.domains]
            for on_sphere in (True, False)
        }
        # Set for a step that is to be looked at.
        self.observer: StepObserver | None = None
        # What this rank has to add to numbers that ranks sum in each step, beside the norm; and the last step's sums.
        self.ballot: Callable[[], Sequence[float]] = tuple
        self.votes: list[float] = []
        self.exchange = exchange
        self.is_stub_optimizer = False
        self.steps_taken = 0
        self.steps_skipped = 0
        # Why the last step was left out; None if it was taken.
        self.fault: Fault | None = None
        self.families = [family for domain in self.domains for family in families_of(domain)]
        for family in self.families:
            self._set_schedule(family)
        self.param_groups = [family.group for family in self.families]
        self.reload_model_params()

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks whose parts together are the model once: every rank owns something of its own."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def _set_schedule(self, family: Family) -> None:
        """Fill in what Megatron-Core's OptimizerParamScheduler reads, and what holds without one."""
        first, options = family.routes[0], self.config
        peak, minimum = options.lr * first.lr_mult, options.min_lr * first.lr_mult
        family.group.update(max_lr=peak, min_lr=minimum, lr=peak)
        family.group.update(wd_mult=float(first.decays), weight_decay=options.weight_decay * first.decays)

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the model's weights as new masters and put the sphere matrices exactly on their spheres."""
        del state_dict
        for family in self.families:
            family.read_weights()
        for family, squares in zip(self._on_sphere(), self._squared_norms(), strict=True):
            family.master.mul_((family.radii / squares.sqrt()).to(family.master.dtype)[:, None, None])
        self._update_model()

    def _on_sphere(self) -> list[Family]:
        return [family for family in self.families if family.rule.on_sphere]

    def _squared_norms(self) -> list[torch.Tensor]:
        """Return ||W||^2 of the global matrices of every family on the sphere."""
        squares = [sphere.dots(family.master, family.master)[:, None] for family in self._on_sphere()]
        return [value[:, 0] for value in self._sum_over_parts(squares, width=1)]

    def _sum_over_parts(self, values: list[torch.Tensor], *, width: int, on_sphere: bool = True) -> list[torch.Tensor]:
        """Sum [count, width] values of the families on the sphere over the ranks that hold parts of their matrices.

        Or those of the matrices off it.

        All matrices of the model part take one all-reduce. Each has a place in it, so that sums do not depend on how
        many ranks add nothing.
        """
        families = self._on_sphere() if on_sphere else list(filter(_is_matrix_off_sphere, self.families))
        result = list(values)
        for domain, places in zip(self.domains, self._places[on_sphere], strict=True):
            groups = domain.groups_of_sums(on_sphere=on_sphere)
            if not places or all(group.size() == 1 for group in groups):
                continue
            summed = torch.zeros((places, width), dtype=torch.float64, device=device.device())
            partial = [index for index, family in enumerate(families) if family.domain is domain and len(family.places)]
            for index in partial:
                if families[index].counts:
                    summed[families[index].places] = values[index]
            for group in groups:
                dist.all_reduce(summed, group=group)
            for index in partial:
                result[index] = summed[families[index].places]
        return result

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Take one step with the reduced gradients in ``main_grad``.

        Numbers that are not finite never reach the weights: where a gradient or an update has one, no rank moves any
        weight, and :attr:`fault` names the tensor.

        Returns:
            Whether it was taken, the global gradient norm before clipping, and None for Megatron-Core's count of zeros.
        """
        self.fault = None
        # For a loop without Megatron-Core's schedules, which have done it.
        self.exchange.finish_grad_sync()
        gradients = [family.gradients() for family in self.families]
        norm = self._global_norm(gradients)
        if self.observer is not None:
            for family, gradient in zip(self.families, gradients, strict=True):
                self.observer.gradients(family, gradient, _weight_in_norms(family))
        clip = self.config.clip_grad
        if not (math.isfinite(norm) and (min(norm, clip) if clip else norm) <= LARGEST_NORM):
            self._skip(GRADIENT, gradients, norm)
            return False, norm, None
        # A rank may own nothing: there can be more of them than rows and matrices.
        if gradients and clip and norm > clip:
            for factor in factors_in_range(clip / norm):
                multiply_all_(gradients, factor)
        # The state has taken in the gradients, whether or not the weights are moved.
        self.steps_taken += 1
        # Before rules overwrite them.
        received = [fading.received(g) for f, g in zip(self.families, gradients, strict=True) if f.rule.on_sphere]
        directions = [
            self._direction(family, gradient) for family, gradient in zip(self.families, gradients, strict=True)
        ]
        on_sphere = [(f, d) for f, d in zip(self.families, directions, strict=True) if f.rule.on_sphere]
        # Each rank scales its part of U as it needs to; sums over the parts are of U itself.
        powers = [sphere.powers_of(rescale_(direction)) for _, direction in on_sphere]
        local = [
            torch.cat([sphere.inner_products(family.master, direction) / each, nonzero[:, None]], dim=1)
            for (family, direction), each, nonzero in zip(on_sphere, powers, received, strict=True)
        ]
        sums = self._sum_over_parts(local, width=4)
        products, received = [each[:, :3] for each in sums], [each[:, 3] for each in sums]
        off_sphere = [d for f, d in zip(self.families, directions, strict=True) if not f.rule.on_sphere]
        if any_on_a_rank([~values.sum().isfinite() for values in (*products, *off_sphere)]):
            self._skip(UPDATE, directions, norm)
            return False, norm, None
        shares = self._shares_of_steps(received)
        for (family, direction), product, each, share in zip(on_sphere, products, powers, shares, strict=True):
            lr, decay, radii = family.group["lr"], family.group["weight_decay"], family.radii
            if self.observer is not None:
                move = sphere.move_of(product, radii=radii, lr=lr, shares=share)
                self.observer.angles(family, turned(product, shrink=1.0 - lr * decay, move=move))
            sphere.step_(family.master, direction, product * each, radii=radii, lr=lr, weight_decay=decay, shares=share)
        if self.observer is not None:
            self._observe_off_sphere(self.observer, directions)
        for family, direction in zip(self.families, directions, strict=True):
            if not family.rule.on_sphere:
                lr, decay = family.group["lr"], family.group["weight_decay"]
                family.master.mul_(1.0 - lr * decay).add_(direction, alpha=-lr * family.scale)
        if self.observer is not None:
            for family, squares in zip(self._on_sphere(), self._squared_norms(), strict=True):
                self.observer.drifts(family, sphere.relative_drift(family.master, family.radii, squares))
        self._update_model()
        return True, norm, None

    def _shares_of_steps(self, received: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Count steps without a gradient; return the share of a step that each matrix on its sphere takes.

        Args:
            received: of each family on the sphere, [count], 0 where the gradient of the whole matrix is zero.

        Returns:
            For each family [count] float64, or None where all take full steps.
        """
        result: list[torch.Tensor | None] = []
        fades = []
        for family, nonzero in zip(self._on_sphere(), received, strict=True):
            fading_with = family.rule.fading()
            if fading_with is None:
                result.append(None)
                continue
            name, decay = fading_with
            share = fading.shares(fading.count_idle_(family.state[fading.IDLE_STEPS], nonzero), decay)
            fades.append((family.state[name], share))
            result.append(share)
        # A momentum at rest is cleared before its elements are denormal; most runs have none.
        if fades and bool(torch.stack([share.min() == 0 for _, share in fades]).any()):
            for momentum, share in fades:
                momentum.mul_((share > 0).to(momentum.dtype)[:, None, None])
        return result

    @torch.no_grad()
    def idle_matrices(self) -> int:
        """Return how many matrices had a gradient of exactly zero in the last step; a collective call.

        Counted are those whose steps fade.
        """
        total = torch.zeros((), dtype=torch.float64, device=device.device())
        for family in self._on_sphere():
            if fading.IDLE_STEPS in family.state and family.counts:
                idle = family.state[fading.IDLE_STEPS][:, 0, 0] > 0
                # Each rank counts the share of a matrix that it holds.
                total += idle.sum() * family.master[0].numel() / math.prod(family.routes[0].shape)
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return round(float(total))

    def _skip(self, kind: int, suspects: Sequence[torch.Tensor], norm: float) -> None:
        """Leave a step out, and note why; a collective call."""
        self.steps_skipped += 1
        too_large = (
            f"the gradient's norm is {norm:.3g}, above {LARGEST_NORM:g}, where squares overflow; set --clip-grad"
        )
        self.fault = find_fault(self, kind, suspects) or Fault(kind, too_large)

    def rewrite_weights(self) -> None:
        """Give the model the weights that its fp32 masters have, on all ranks; a collective call."""
        self._update_model()

    def _observe_off_sphere(self, observer: StepObserver, directions: Sequence[torch.Tensor]) -> None:
        """Note the angles that matrices off the sphere are about to turn."""
        moves = [pair for pair in zip(self.families, directions, strict=True) if _is_matrix_off_sphere(pair[0])]
        local = [sphere.inner_products(family.master, direction) for family, direction in moves]
        products = self._sum_over_parts(local, width=3, on_sphere=False)
        for (family, _), product in zip(moves, products, strict=True):
            lr, decay = family.group["lr"], family.group["weight_decay"]
            observer.angles(family, turned(product, shrink=1.0 - lr * decay, move=lr * family.scale))

    def _direction(self, family: Family, gradients: torch.Tensor) -> torch.Tensor:
        """Update the family's state and return the directions along whose negative it moves."""
        return family.rule.direction_(gradients, family.state, family.part(self.steps_taken, self.config.ns_strategy))

    def _global_norm(self, gradients: Sequence[torch.Tensor]) -> float:
        """Return the norm over all gradients of the model, each counted once; sum the ballots on the way."""
        ballot = self.ballot()
        summed = torch.zeros(1 + len(ballot), dtype=torch.float64, device=device.device())
        for place, vote in enumerate(ballot, start=1):
            if vote:
                summed[place] = vote
        for family, gradient in zip(self.families, gradients, strict=True):
            # A replica adds nothing, but what is not finite in it stays so (0 x inf is NaN) and skips the step too.
            summed[0] += _weight_in_norms(family) * (gradient * gradient).sum(dtype=torch.float64)
        dist.all_reduce(summed, group=self.get_grad_stats_parallel_group())
        squared, *self.votes = summed.tolist()
        if not SMALLEST_SQUARED_NORM < squared < math.inf:
            squared = self._squared_norm_of_any_size(gradients)
        return math.sqrt(squared) if math.isfinite(squared) else squared

    def _squared_norm_of_any_size(self, gradients: Sequence[torch.Tensor]) -> float:
        """Return the squared norm over all gradients where squares of elements are not in range in fp32."""
        summed = torch.zeros((), dtype=torch.float64, device=device.device())
        for family, gradient in zip(self.families, gradients, strict=True):
            summed += _weight_in_norms(family) * squared_norms(gradient).sum()
        dist.all_reduce(summed, group=self.get_grad_stats_parallel_group())
        return float(summed)

    def _update_model(self, *, exact: bool = False) -> None:
        """Write what this rank owns into the model and gather the rest from the other owners; ``exact``: not in FP8."""
        self.exchange.finish_param_sync()
        for family in self.families:
            family.write_weights()
        self.exchange.start_param_sync(exact=exact)

    @torch.no_grad()
    def radius_drift(self) -> float:
        """Return the largest | ||W||/R - 1 | over all sphere matrices of the model; a collective call."""
        drifts = [
            sphere.relative_drift(family.master, family.radii, squares).max()
            for family, squares in zip(self._on_sphere(), self._squared_norms(), strict=True)
        ]
        largest = torch.stack([torch.zeros((), dtype=torch.float64, device=device.device()), *drifts]).max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.get_grad_stats_parallel_group())
        return float(largest)

    def state_bytes(self) -> int:
        """Bytes of fp32 weights and optimizer state on this rank."""
        return sum(
            tensor.numel() * tensor.element_size() for family in self.families for tensor in family.tensors().values()
        )

    def describe(self) -> str:
        """Return how the data- and tensor-parallel ranks share the work, as seen by this rank."""
        lines = [f"ownership: {domain.plan.describe()}" for domain in self.domains]
        padding = [bucket.padding for bucket in self.exchange.buckets]
        lines.append(
            f"optimizer state on this rank: {self.state_bytes():,} bytes; gradients in {len(padding)} bucket(s),"
            f" at most {max(padding):.1%} padding"
        )
        jobs: dict[NewtonSchulz, list[Job]] = {}
        for family in self.families:
            newton_schulz, shape = family.rule.newton_schulz, family.routes[0].shape
            if newton_schulz is not None and family.share_dim != DISTINCT and family.share_group.size() > 1:
                job = Job(len(family.routes), shape[0], shape[1], family.share_dim, family.share_group.size())
                jobs.setdefault(newton_schulz, []).append(job)
        for newton_schulz, alike in jobs.items():
            table = describe_strategies(alike, newton_schulz, machine(), self.config.ns_strategy)
            lines.append(f"Newton-Schulz of what this rank shares with others, predicted:\n{table}")
        return "\n".join(lines)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop ``.grad`` and zero ``main_grad``, which Megatron-Core's DistributedDataParallel does itself."""
        del set_to_none
        for parameter in self.exchange.bucket_of:
            parameter.grad = None
        if self.exchange.reduces:
            self.exchange.zero()

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
        routes = [entry for domain in self.domains for entry in domain.routes]
        counts_idle = any(fading.IDLE_STEPS in rule.entries() for rule in {entry.rule for entry in routes})
        return {
            "steps_taken": self.steps_taken,
            "steps_skipped": self.steps_skipped,
            COUNTS_IDLE_STEPS: counts_idle,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over counters and tensors of a loaded :meth:`sharded_state_dict`; the model's weights follow."""
        self.steps_taken = state_dict["steps_taken"]
        self.steps_skipped = state_dict["steps_skipped"]
        for number, family in enumerate(self.families):
            for name, stacked in family.tensors().items():
                if name == fading.IDLE_STEPS and name not in state_dict["state"][number]:
                    # Of an earlier version, or of a run whose steps did not fade.
                    stacked.zero_()
                    continue
                for index, target in enumerate(stacked):
                    parts = state_dict["state"][number][name][index]
                    target.copy_(torch.cat([part.reshape(-1, target.shape[1]) for part in parts]))
        self._update_model()

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
        # The model's weights are saved beside the state. Those that travelled in FP8 come again as they are; the layers
        # round them to the same numbers.
        if self.exchange.in_fp8:
            self._update_model(exact=True)
        self.exchange.finish_param_sync()
        parameters = [entry.parameter for family in self.families for entry in family.routes]
        weights = sharded_weights(model_sharded_state_dict, parameters)

        def entries(family: Family, name: str, stacked: torch.Tensor) -> list[list[ShardedTensor]]:
            by_row = name in family.state and family.rule.entries()[name].shape == "rows"
            return [
                sharded_state(weights[entry.parameter], block, tensor, name, by_row=by_row)
                for entry, block, tensor in zip(family.routes, family.blocks, stacked, strict=True)
            ]

        state = [
            {name: entries(family, name, stacked) for name, stacked in family.tensors().items()}
            for family in self.families
        ]
        return {**self.state_dict(), "state": state}


def _is_matrix_off_sphere(family: Family) -> bool:
    return not family.rule.on_sphere and family.routes[0].is_matrix


def _weight_in_norms(family: Family) -> float:
    """1, or 0 for a copy that another rank counts."""
    copy_of_embedding = getattr(family.routes[0].parameter, "shared", False)
    return 1.0 if family.counts and not copy_of_embedding else 0.0
