"""The flags that describe the cluster that a run is planned for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_hyperp.config import flag_name
from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GPUS
from megatron_hyperp.planning.layouts import Cluster

# By destination; what is not given is not in the parser's result, so that it can be told from what is.
DEFAULTS: dict[str, Any] = {"gpu": "H100", "gpus_per_node": 8, "mfu": 0.4, "memory_fraction": 0.9}


def add_cluster_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of all but the number of GPUs; :func:`cluster_of` reads them."""

    def add(name: str, text: str, **options: Any) -> None:
        group.add_argument(flag_name(name), default=argparse.SUPPRESS, help=f"{text} [{DEFAULTS[name]}]", **options)

    add("gpu", "kind of GPU", choices=GPUS)
    add("gpus_per_node", "GPUs in each node", type=int)
    add("mfu", "model FLOPs utilization to expect, of the peak", type=float)
    add("memory_fraction", "of a GPU's memory that may be used", type=float)


def cluster_of(given: Mapping[str, Any], gpus: int) -> Cluster:
    """Return the cluster that the flags describe.

    Args:
        given: what a parser with :func:`add_cluster_flags` found, by destination; other entries are passed over.
        gpus: how many there are.

    Raises:
        UsageError: a value out of range.
    """
    options = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    if options["gpus_per_node"] < 1:
        raise UsageError(f"--gpus-per-node is {options['gpus_per_node']}; it must be 1 or more")
    for name in ("mfu", "memory_fraction"):
        if not 0 < options[name] <= 1:
            raise UsageError(f"{flag_name(name)} is {options[name]:g}; it must be above 0 and at most 1")
    kind = GPUS[options["gpu"]]
    return Cluster(kind, gpus, options["gpus_per_node"], options["mfu"], options["memory_fraction"])
