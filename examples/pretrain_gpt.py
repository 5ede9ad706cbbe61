"""Pretrain a GPT with HyperP.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --config FILE [flags]

Reading order: megatron_hyperp/config.py (the knobs), training/loop.py (the run), model/build.py, optim/distributed.py.
"""

import os
import sys

from megatron_hyperp import arguments
from megatron_hyperp.errors import UsageError, run_command


def main(argv: list[str]) -> int:
    """Read config and flags, then train; return the exit code."""
    config = arguments.parse(argv, description="Pretrain a GPT with HyperP on Megatron-Core.")
    from megatron_hyperp.training.loop import pretrain

    return pretrain(config, world_size=world_size())


def world_size() -> int:
    """Return the ranks that the launcher started, 1 without a launcher.

    Raises:
        UsageError: several processes were started without torchrun's environment; each would train alone.
    """
    if "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(name, "1") != "1":
            raise UsageError(f"{name} is {os.environ[name]} but RANK is not set; start the ranks with torchrun")
    return 1


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
