"""Does this installation train? Two steps of a tiny model on this machine's device, with any flags of the trainer."""

import tempfile

from megatron_hyperp import arguments
from megatron_hyperp.errors import run_command

# Sizes are multiples of 128, so that every FP8 recipe takes them.
MODEL = (
    "--mock-data --num-layers 2 --hidden-size 128 --num-attention-heads 2 --seq-length 128 --vocab-size 256"
    " --train-iters 2 --micro-batch-size 2 --global-batch-size 4 --log-interval 1 --stability-interval 1"
    " --eval-interval 0"
)


def main(argv: list[str]) -> int:
    """Train; what cannot be is an error in one line. Return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*MODEL.split(), "--run-dir", folder, *argv]
        config = arguments.parse(flags, description="Train two steps of a tiny model; flags are the trainer's.")
        from megatron_hyperp.training.pretrain import pretrain

        code = pretrain(config, world_size=1)
    if not code:
        print("this installation trains")
    return code


if __name__ == "__main__":
    run_command(main)
