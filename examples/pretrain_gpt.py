"""Pretrain a GPT with HyperP.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --config FILE [flags]

Reading order: megatron_hyperp/config.py (the knobs), training/pretrain.py and loop.py (the run), model/build.py,
optim/distributed.py.
"""

import argparse
import os
import sys
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config, flag_name
from megatron_hyperp.errors import EXIT_STOPPED, UsageError, run_command
from megatron_hyperp.launch import launch
from megatron_hyperp.planning.arguments import DEFAULTS, add_cluster_flags, cluster_of


def parser() -> argparse.ArgumentParser:
    """Return the parser of every knob, and of dry runs."""
    result = arguments.build_parser("Pretrain a GPT with HyperP on Megatron-Core.")
    group = result.add_argument_group("dry run", "see what a job of any size would do, on one machine, without a GPU")
    group.add_argument("--dry-run", action="store_true", help="build a rank's model and optimizer without memory; stop")
    group.add_argument("--world-size", type=int, default=argparse.SUPPRESS, help="ranks of the job [1]")
    group.add_argument(
        "--dry-run-rank",
        type=int,
        default=argparse.SUPPRESS,
        help="which to build [0, and the last one of several pipeline stages]",
    )
    add_cluster_flags(group)
    return result


def main(argv: list[str]) -> int:
    """Read config and flags, then train, or only say what training would do; return the exit code."""
    options = vars(parser().parse_args(argv))
    config = arguments.from_flags(options)
    if options["dry_run"]:
        rehearse(config, options)
        return 0
    for name in ("world_size", "dry_run_rank", *DEFAULTS):
        if name in options:
            raise UsageError(
                f"{flag_name(name)} needs --dry-run; give it, or leave this out: torchrun says how many ranks train",
                same_on_all_ranks=True,
            )
    from megatron_hyperp.training.pretrain import pretrain

    code = pretrain(config, world_size=world_size())
    # Torchrun takes every code but 0 for a failure, and would start again what was asked to stop.
    return 0 if code == EXIT_STOPPED and restarts() else code


def rehearse(config: Config, options: dict[str, Any]) -> None:
    """Build a rank of a job of ``--world-size`` ranks without memory, and print what it needs.

    Raises:
        UsageError: bad input, or a launcher started this process.
    """
    if "RANK" in os.environ:
        raise UsageError(
            "--dry-run is one process; start it without torchrun, with --world-size", same_on_all_ranks=True
        )
    ranks = options.get("world_size", 1)
    if ranks < 1:
        raise UsageError(f"--world-size is {ranks}; it must be 1 or more")
    rank, cluster = options.get("dry_run_rank"), cluster_of(options, ranks)
    if rank is not None and not 0 <= rank < ranks:
        raise UsageError(f"--dry-run-rank is {rank}; the ranks of --world-size {ranks} are 0 to {ranks - 1}")
    from megatron_hyperp.training.dry_run import dry_run

    dry_run(config, cluster, rank=rank, log=print)


def restarts() -> bool:
    """Whether torchrun starts all ranks again when one has failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def world_size() -> int:
    """Return the ranks that the launcher started, 1 without a launcher.

    Raises:
        UsageError: the launcher's variables are incomplete, or torchrun could not restart the ranks.
    """
    place = launch()
    if place is not None and restarts() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UsageError(
            "torchrun --max-restarts would let restarted ranks look for each other where dead ones were (PyTorch issue"
            " 135712); set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give --standalone or --rdzv-backend c10d",
            same_on_all_ranks=True,
        )
    return 1 if place is None else place.world_size


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
