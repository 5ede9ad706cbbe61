"""Plans of one run on clusters of several sizes and kinds, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hyperp.hardware import GIB
from megatron_hyperp.planning.plan import RunPlan, size_lines
from megatron_hyperp.text import aligned

HEAD = ("GPUs", "TP", "PP", "VPP", "EP", "DP", "micro-batch", "recomputed", "GiB", "hours", "with overheads")


def table(plans: Sequence[RunPlan]) -> str:
    """Return what the run is, and a row for each cluster; ``plans`` are of the same config.

    Hours are those at the expected MFU, and those by which layouts are ranked: with the bubble, recomputation,
    communication that computation does not hide, and Newton-Schulz on top.
    """
    rows = [row(plan) for plan in plans]
    lines = aligned([HEAD, *(cells for cells in rows if len(cells) == len(HEAD))], right=lambda column: column > 0)
    found = iter(lines[1:])
    fitted = [next(found) if len(cells) == len(HEAD) else "  ".join(cells) for cells in rows]
    return "\n".join([*size_lines(plans[0]), "", lines[0], *fitted])


def row(plan: RunPlan) -> tuple[str, ...]:
    """Return the cells of one cluster: of the layout to take, or the reason against the one that nearly fits."""
    cluster = plan.cluster
    title = f"{cluster.gpus} {cluster.gpu.name}"
    if not plan.fitting:
        return title, f"none: {_nearest(plan)}"
    layout = plan.fitting[0]
    return (
        title,
        *map(str, layout.parallelism.values()),
        str(layout.config.training.micro_batch_size),
        layout.recompute,
        f"{layout.memory.total / GIB:.1f}",
        f"{plan.hours:.3g}",
        f"{layout.seconds * plan.config.training.train_iters / 3600:.3g}",
    )


def _nearest(plan: RunPlan) -> str:
    """Why the layout that needs the least memory does not fit; if none divides, why the first one does not."""
    divides = [item for item in plan.rejected if item.need is not None]
    best = min(divides, key=lambda item: item.need or 0) if divides else plan.rejected[0]
    return f"{best.title}: {best.reason}"
