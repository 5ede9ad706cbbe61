"""Plans of one run on clusters of several sizes and kinds, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hyperp.hardware import GIB
from megatron_hyperp.planning.plan import RunPlan, size_lines
from megatron_hyperp.text import aligned

HEAD = ("GPUs", "TP", "PP", "VPP", "EP", "DP", "micro-batch", "recomputed", "GiB", "hours", "with overheads")


def table(plans: Sequence[RunPlan]) -> str:
    """Return what the run is, and a row for each cluster; kinds of GPUs that make no difference share one.

    Hours are those at the expected MFU, and those by which layouts are ranked: with the bubble, recomputation,
    communication that computation does not hide, and Newton-Schulz on top.

    Args:
        plans: of the same config.
    """
    kinds: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for plan in plans:
        kinds.setdefault((plan.cluster.gpus, cells(plan)), []).append(plan.cluster.gpu.name)
    titled = [(f"{gpus} {'/'.join(names)}", *found) for (gpus, found), names in kinds.items()]
    fitting = [row for row in titled if len(row) == len(HEAD)]
    head, *lines = aligned([HEAD, *fitting], right=lambda column: column > 0)
    texts = dict(zip(fitting, lines, strict=True))
    return "\n".join([*size_lines(plans[0]), "", head, *(texts.get(row, "  ".join(row)) for row in titled)])


def cells(plan: RunPlan) -> tuple[str, ...]:
    """Return what follows the cluster in its row: the layout to take, or the reason against what nearly fits."""
    if not plan.fitting:
        return (f"none: {_nearest(plan)}",)
    layout = plan.fitting[0]
    return (
        *map(str, layout.parallelism.values()),
        str(layout.config.training.micro_batch_size),
        layout.recompute,
        f"{layout.memory.total / GIB:.1f}",
        _hours(plan.hours),
        _hours(layout.seconds * plan.config.training.train_iters / 3600),
    )


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _nearest(plan: RunPlan) -> str:
    """Why the layout that needs the least memory does not fit; if none divides, why the first one does not."""
    divides = [item for item in plan.rejected if item.need is not None]
    best = min(divides, key=lambda item: item.need or 0) if divides else plan.rejected[0]
    return f"{best.title}: {best.reason}"
