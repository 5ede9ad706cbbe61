"""Pretrain a GPT with HyperP.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --config FILE [flags]

Reading order: megatron_hyperp/config.py (the knobs), training/loop.py (the run), model/build.py, optim/distributed.py.
"""

import os
import sys

from megatron_hyperp import arguments
from megatron_hyperp.errors import run_command


def main(argv: list[str]) -> None:
    """Read config and flags, then train."""
    config = arguments.parse(argv, description="Pretrain a GPT with HyperP on Megatron-Core.")
    from megatron_hyperp.training.loop import pretrain

    pretrain(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
