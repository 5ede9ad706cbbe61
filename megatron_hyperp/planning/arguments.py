"""The flags that describe the cluster that a run is planned for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_hyperp.config import flag_name
from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.planning.checkpoints import GB, Storage

if TYPE_CHECKING:
    from megatron_hyperp.planning.layouts import Cluster

# By destination; what is not given is not in the parser's result, so that it can be told from what is.
DEFAULTS: dict[str, Any] = {
    "gpu": "H100",
    "gpus_per_node": 8,
    "mfu": 0.4,
    "memory_fraction": 0.9,
    "checkpoint_bandwidth": None,
    # Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 GPUs in 54 days.
    "gpu_mtbf_hours": 50_000.0,
    "restart_minutes": 10.0,
}


def add_cluster_flags(group: argparse._ArgumentGroup, *, several: bool = False) -> None:
    """Add the flags of all but the number of GPUs; :func:`cluster_of` reads them.

    Args:
        group: of the parser.
        several: whether ``--gpu`` takes several kinds.
    """

    def add(name: str, text: str, **options: Any) -> None:
        default = "" if DEFAULTS[name] is None else f" [{DEFAULTS[name]}]"
        group.add_argument(flag_name(name), default=argparse.SUPPRESS, help=text + default, **options)

    add("gpu", "kind of GPU", choices=GPUS, **({"nargs": "+"} if several else {}))
    add("gpus_per_node", "GPUs in each node", type=int)
    add("mfu", "model FLOPs utilization to expect, of the peak", type=float)
    add("memory_fraction", "of a GPU's memory that may be used", type=float)
    add("checkpoint_bandwidth", "GB/s at which all ranks together save: says how often to", type=float)
    add("gpu_mtbf_hours", "hours of one GPU between failures that end a job, whatever fails", type=float)
    add("restart_minutes", "from a failure to the next step", type=float)


def cluster_of(given: Mapping[str, Any], gpus: int) -> Cluster:
    """Return the cluster that the flags describe.

    Args:
        given: what a parser with :func:`add_cluster_flags` found, by destination; other entries are passed over.
        gpus: how many there are.

    Raises:
        UsageError: a value out of range.
    """
    # It imports torch: a command line that only reads flags does without.
    from megatron_hyperp.planning.layouts import Cluster

    options = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    if options["gpus_per_node"] < 1:
        raise UsageError(f"--gpus-per-node is {options['gpus_per_node']}; it must be 1 or more")
    for name in ("mfu", "memory_fraction"):
        if not 0 < options[name] <= 1:
            raise UsageError(f"{flag_name(name)} is {options[name]:g}; it must be above 0 and at most 1")
    return Cluster(
        GPUS[options["gpu"]],
        gpus,
        options["gpus_per_node"],
        options["mfu"],
        options["memory_fraction"],
        _storage(options),
    )


def _storage(options: Mapping[str, Any]) -> Storage | None:
    bandwidth, between, restart = (
        options[name] for name in ("checkpoint_bandwidth", "gpu_mtbf_hours", "restart_minutes")
    )
    for name, value in (("checkpoint_bandwidth", bandwidth), ("gpu_mtbf_hours", between)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag_name(name)} is {value:g}; it must be a number above 0")
    if not 0 <= restart < math.inf:
        raise UsageError(f"--restart-minutes is {restart:g}; it must be a number, 0 or more")
    if bandwidth is not None:
        return Storage(GB * bandwidth, between, restart)
    for name in ("gpu_mtbf_hours", "restart_minutes"):
        if options[name] != DEFAULTS[name]:
            raise UsageError(f"{flag_name(name)} needs --checkpoint-bandwidth; give it, or leave this out")
    return None
