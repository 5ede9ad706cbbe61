"""A signal to one rank stops all of them after the same step."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import torch.distributed as dist

from tests.run_distributed import run_distributed
from tests.toy import toy_config, write_corpus


def stop_asked_on_one_rank(folder: str) -> tuple[int, str | None]:
    """Train; rank 1 alone is asked to stop, in the third step."""
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.device import adapt_megatron, init_process_group
    from megatron_hyperp.training.loop import Trainer

    adapt_megatron()
    init_process_group(2)
    Path(folder, "run").mkdir(exist_ok=True)
    config = toy_config(f"{folder}/toy", Path(folder) / "run", num_layers=1).resolve(world_size=dist.get_world_size())
    trainer = Trainer(config, load_tokenizer(config.data.tokenizer_model or ""), None)
    steps = iter(range(100))

    def ballot() -> list[float]:
        if next(steps) == 2 and dist.get_rank() == 1:
            trainer.stop_requests.note(signal.SIGTERM, time.monotonic())
        return trainer.stop_requests.ballot()

    trainer.optimizer.ballot = ballot
    progress = trainer.train()
    trainer.close_reports()
    return progress.iteration, trainer.stopped


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    write_corpus(tmp_path, documents=200)
    assert run_distributed(stop_asked_on_one_rank, 2, str(tmp_path)) == [(3, "SIGTERM (ranks that had got it: 1)")] * 2
