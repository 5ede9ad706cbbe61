"""Weak and strong scaling of the optimizer's step, by the cost model: nothing here is measured.

A model's step does not grow with the batch. So strong scaling is one model on more ranks; and weak scaling a larger
model on more ranks, so that Newton-Schulz, which grows with the fourth power of the depth, stays about equal on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.optimizer_scaling.stepping import Case
from megatron_hyperp import arguments, device
from megatron_hyperp.config import Config
from megatron_hyperp.estimate import train_flops_per_token
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.optim.tensor_parallel import MACHINES
from megatron_hyperp.planning.layouts import Cluster
from megatron_hyperp.planning.memory import holdings
from megatron_hyperp.planning.plan import with_vocabulary
from megatron_hyperp.planning.step import StepCost, step_costs

RECIPES = Path(__file__).resolve().parents[2] / "examples/configs"
STRONG = ("dense_d8", "dense_d24", "moe_d8", "moe_d24")
STRONG_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# As (depth / 24)^4 of 1,024 ranks, in whole nodes.
WEAK = ((8, 16), (12, 64), (16, 200), (20, 496), (24, 1024))
EXPERTS = 64


@dataclass(frozen=True, slots=True)
class Point:
    """A step on some ranks of H100, predicted.

    Attributes:
        ranks: all of them data-parallel; up to eight share the experts.
        work: FLOPs of Newton-Schulz that one rank alone would need for the model.
        busiest: FLOPs of the busiest rank.
        sent: bytes, of that which sends most.
        collectives: of that which takes part in most.
        newton_schulz: seconds of the slowest rank.
        update: seconds in which it reads and writes what it owns.
        exchange: seconds in which gradients and weights travel and norms are summed, nothing hidden.
        passes: seconds of forward and backward pass of the recipe's batch at 40% MFU.
    """

    ranks: int
    work: float
    busiest: float
    sent: float
    collectives: int
    newton_schulz: float
    update: float
    exchange: float
    passes: float

    @property
    def efficiency(self) -> float:
        """Useful FLOP/s of Newton-Schulz on each rank, over the rate that products run at."""
        return self.work / self.ranks / self.newton_schulz / MACHINES["cuda"].flops


def strong(name: str, ranks: Sequence[int]) -> list[Point]:
    """One recipe on more ranks."""
    return [point(name, number) for number in ranks]


def weak(kind: str) -> list[Point]:
    """Recipes of growing depth on as many more ranks."""
    return [point(f"{kind}_d{depth}", ranks) for depth, ranks in WEAK]


def point(name: str, ranks: int) -> Point:
    """Predict the step of a recipe, without tensor or pipeline parallelism, on H100."""
    with device.planning_for("cuda"):
        config, alone = _recipe(name, ranks), _recipe(name, 1)
        costs = step_costs(config, ranks, holdings(config, ranks, 0))
        [whole] = step_costs(alone, 1, holdings(alone, 1, 0))
    cluster, rates = Cluster(GPUS["H100"], ranks), MACHINES["cuda"]
    travel = costs[0].exchange, costs[0].norms
    batch = config.transfer.base_batch_tokens * train_flops_per_token(config.model, config.moe)
    return Point(
        ranks,
        whole.flops,
        max(cost.flops for cost in costs),
        max(cost.sent for cost in costs),
        max(cost.collectives for cost in costs),
        max(cost.newton_schulz.seconds(rates) for cost in costs),
        # Read once and written once.
        max(2 * cost.touched for cost in costs) / rates.copy_bytes_per_s,
        sum(cost.seconds(replace(rates, bytes_per_s=cluster.bytes_per_s(ranks))) for cost in travel),
        batch / cluster.flops_per_s,
    )


def _recipe(name: str, ranks: int) -> Config:
    config = with_vocabulary(arguments.load_yaml(RECIPES / f"{name}.yaml"))
    # A batch for any number of ranks: the step does not depend on it.
    config.training.global_batch_size = ranks
    if config.moe.moe_topk:
        config.moe.num_experts = EXPERTS
        config.parallel.expert_model_parallel_size = min(8, ranks)
    return config.resolve(world_size=ranks)


def predicted(case: Case) -> list[StepCost]:
    """Predict what each rank of this machine does in a step."""
    with device.planning_for("cpu"):
        config = case.config()
        return step_costs(config, case.ranks, holdings(config, case.ranks, 0))
