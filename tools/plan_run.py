"""Plan a run: from --depth, or any config, its size, tokens, FLOPs, learning rate, memory, traffic, time and layout.

Takes every flag of examples/pretrain_gpt.py, and those of the cluster. Parallel sizes that are given (above 1) are
kept; the others are searched for. Several numbers or kinds of GPUs make a table of the layouts to take.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments, device
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.planning.arguments import DEFAULTS, add_cluster_flags, cluster_of
from megatron_hyperp.planning.layouts import Cluster
from megatron_hyperp.planning.plan import RunPlan, describe, make_plan, to_json, to_yaml
from megatron_hyperp.planning.table import table

DESCRIPTION = "Plan a run on a cluster: budget, learning rate, memory, traffic, time, and the layout to take."


def parser() -> argparse.ArgumentParser:
    """Return the trainer's parser with the cluster's flags."""
    result = arguments.build_parser(DESCRIPTION)
    group = result.add_argument_group("cluster and output")
    group.add_argument("--gpus", type=int, nargs="+", default=[8], metavar="N", help="how many there are [8]")
    add_cluster_flags(group, several=True)
    output = group.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--yaml", type=local_path, metavar="FILE", help="write a config for the trainer; - prints it")
    return result


def main(argv: list[str]) -> None:
    """Plan, print or write."""
    options = vars(parser().parse_args(argv))
    config = arguments.from_flags(options)
    clusters = clusters_of(options)
    with device.planning_for("cuda"):
        plans = [make_plan(config, cluster) for cluster in clusters]
    several = len(plans) > 1
    if options["json"]:
        print(json.dumps([to_json(plan) for plan in plans] if several else to_json(plans[0]), indent=2))
    elif options["yaml"]:
        write_config(plans[0], options["yaml"])
    else:
        print(table(plans) if several else describe(plans[0]))


def clusters_of(options: dict[str, Any]) -> list[Cluster]:
    """Return a cluster for each number and kind of GPUs.

    Raises:
        UsageError: a value out of range, or several of them beside ``--yaml``.
    """
    for gpus in options["gpus"]:
        if gpus < 1:
            raise UsageError(f"--gpus is {gpus}; it must be 1 or more")
    kinds = options.get("gpu", [DEFAULTS["gpu"]])
    if options["yaml"] and len(kinds) * len(options["gpus"]) > 1:
        raise UsageError("--yaml writes the config for one cluster; give it one number and one kind of GPUs")
    return [cluster_of({**options, "gpu": kind}, gpus) for gpus in options["gpus"] for kind in kinds]


def write_config(plan: RunPlan, path: str) -> None:
    """Write the trainer's config, or print it to "-".

    Raises:
        UsageError: no layout fits, or the file cannot be written.
    """
    if not plan.fitting:
        raise UsageError(
            f"no layout fits {plan.cluster.gpus} GPUs; leave out --yaml to see why, and give more --gpus or a larger"
            " --gpu"
        )
    if path == "-":
        print(to_yaml(plan), end="")
        return
    try:
        Path(path).write_text(to_yaml(plan))
    except OSError as error:
        raise UsageError(
            f"--yaml {path} cannot be written ({error.strerror}); give a file in a folder that can"
        ) from error
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
