"""In place of the trainer, in milliseconds: the loss is a parabola in log lr, with its minimum at 0.06.

It ends as the trainer does where a learning rate is above 0.5 (non-finite loss), 1 (non-finite gradients), 2 (a crash).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from megatron_hyperp import arguments


def main() -> None:
    config = arguments.load_yaml(sys.argv[sys.argv.index("--config") + 1]).resolve(tokenizer_vocab_size=64)
    lr, folder = config.learning_rate().value, Path(config.logging.run_dir)
    with (folder.parent / "launched.txt").open("a") as stream:
        stream.write(folder.name + "\n")
    if lr > 2:
        sys.exit("error: out of memory, say")
    if lr > 1:
        print("error: 20 steps in a row had a non-finite gradient, up to iteration 21", file=sys.stderr)
        sys.exit(2)
    loss = 3 + 0.1 * math.log(lr / 0.06) ** 2 + 0.01 * config.training.seed + 0.1 / config.model.num_layers
    wait(folder)
    rows = [(0, 4.2), (config.training.train_iters, loss if lr < 0.5 else None)]
    lines = [json.dumps({"iteration": iteration, "eval_loss": value}) for iteration, value in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def wait(folder: Path) -> None:
    """Leave half a run, then wait for ever, or send a signal to the sweep, where the environment asks for it."""
    if os.environ.get("FAKE_STOPS_AT", "none") in folder.name:
        (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "eval_loss": 4.2}) + "\n")
        os.kill(os.getppid(), signal.Signals[os.environ["FAKE_SIGNAL"]])
        time.sleep(600)


if __name__ == "__main__":
    main()
