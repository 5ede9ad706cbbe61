"""Time whole optimizer steps: from each rank's own gradients in ``main_grad`` to the new weights on every rank.

Ours is the package's optimizer under each strategy, and with AdamW; beside it the two steps of ``others.py``. All take
the same steps on stand-ins for slices of the paper's models, and must end at the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benchmarks.optimizer_step.measuring import WARM_UPS, Traffic, counted, largest, run_ranks, seconds, slowest
from benchmarks.optimizer_step.slices import SLICES, config_of
from benchmarks.turns import in_turns
from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.tensor_parallel import AUTO, MACHINES
from megatron_hyperp.planning.inventory import shapes
from megatron_hyperp.text import aligned
from megatron_hyperp.training.setup import initialize_megatron

if TYPE_CHECKING:
    from benchmarks.optimizer_step.methods import Method

# Largest relative difference of any weight matrix between methods: rounding, where Newton-Schulz amplifies it.
AGREEMENT = 1e-4
# Columns of the table, with the units' factors.
COLUMNS = {
    "step ms": 1e3,
    "Newton-Schulz ms": 1e3,
    "predicted ms": 1e3,
    "exchange ms": 1e3,
    "collectives": 1.0,
    "MB sent": 1e-6,
    "N-S GFLOP": 1e-9,
    "MB state": 1e-6,
}


def run(names: Sequence[str], tensor_ranks: int, data_ranks: int, repeats: int, port: str) -> None:
    """Measure the named slices on tensor-parallel times data-parallel ranks.

    Raises:
        UsageError: an unknown slice.
    """
    unknown = [name for name in names if name not in SLICES]
    if unknown:
        raise UsageError(f"--models {unknown[0]} is unknown; known are {', '.join(SLICES)}")
    for name in names:
        run_ranks(compare, tensor_ranks * data_ranks, port, name, tensor_ranks, repeats)


def compare(name: str, tensor_ranks: int, repeats: int) -> None:
    """Measure one slice; run by every rank.

    Raises:
        AssertionError: methods end at different weights.
    """
    # It silences what Megatron-Core says while it is imported, so imports of that come after it.
    device.adapt_megatron()
    from benchmarks.optimizer_step.methods import local_gradients, methods_of

    config = config_of(SLICES[name], tensor_ranks, "hyperp", AUTO)
    initialize_megatron(config)
    methods, gradients = methods_of(SLICES[name], tensor_ranks), local_gradients(config)
    steps: dict[str, Callable[[], list[float]]] = {
        label: slowest(partial(timed_step, method, gradients)) for label, method in methods.items()
    }
    figures = in_turns(steps, repeats, warm_ups=WARM_UPS)
    worst = max(worst_difference(method, methods[AUTO]) for label, method in methods.items() if label != "AdamW")
    if worst > AGREEMENT:
        raise AssertionError(f"{name}: weights differ by {worst:.1e} between methods, more than {AGREEMENT:g}")
    for label, method in methods.items():
        spent, newton_schulz, exchange = figures[label]
        predicted, *counts = counted_step(method, gradients)
        figures[label] = [spent, newton_schulz, predicted, exchange, *counts]
    if dist.get_rank() == 0:
        size = sum(math.prod(item.shape) for item in shapes(config))
        title = f"{name}: {size / 1e6:.1f}M parameters, TP{tensor_ranks} x DP{dist.get_world_size() // tensor_ranks};"
        title += (
            f" after {WARM_UPS + repeats} steps the weights agree within {worst:.0e}; in parentheses: relative to auto"
        )
        print(f"{title}\n{table(figures)}", flush=True)


def timed_step(method: Method, gradients: Sequence[torch.Tensor]) -> list[float]:
    """Take a step; return the seconds of all of it, of Newton-Schulz, and of exchanging gradients and weights."""
    method.load(gradients)
    whole = seconds(method.step)
    return [whole, method.clock.take("newton-schulz"), method.clock.take("exchange")]


def counted_step(method: Method, gradients: Sequence[torch.Tensor]) -> list[float]:
    """Take a step; return what the busiest rank needs, in the order of the last columns of the table.

    These are predicted seconds of Newton-Schulz, collectives, bytes sent, FLOPs of Newton-Schulz, and bytes of state.
    """
    method.load(gradients)
    with counted() as traffic:
        method.step()
    return largest(needs(method, traffic)).tolist()


def needs(method: Method, traffic: Traffic) -> list[float]:
    """Return the figures of :func:`counted_step` for this rank."""
    predicted = sum(cost.seconds(MACHINES["cpu"]) for cost in method.newton_schulz)
    flops = sum(cost.flops for cost in method.newton_schulz)
    return [predicted, float(traffic.collectives), traffic.sent, flops, float(method.state_bytes)]


def worst_difference(method: Method, reference: Method) -> float:
    """Return the largest relative difference of a weight, over all weights and ranks."""
    pairs = zip(method.parameters, reference.parameters, strict=True)
    differences = [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]
    return float(largest([max(differences)]))


def table(figures: Mapping[str, Sequence[float]]) -> str:
    """Return the table, one method a row; each figure with its ratio to auto's."""
    rows = [["", *COLUMNS]]
    for label, values in figures.items():
        cells = [label]
        for value, base, unit in zip(values, figures[AUTO], COLUMNS.values(), strict=True):
            digits = 0 if unit == 1.0 else 1
            cells.append(f"{unit * value:.{digits}f} ({value / base:.2f})" if value else "-")
        rows.append(cells)
    return "\n".join(aligned(rows, right=lambda column: True))
