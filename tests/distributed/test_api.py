"""The optimizer as a library: the loop of docs/api.md, stock models, wrapped models, frozen parameters, overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run_distributed import ROOT, run_distributed
from tests.toy import toy_config

TP2 = {"tensor_model_parallel_size": 2}
# The model of docs/api.md in the trainer's terms.
MODEL: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4},
    **{"optimizer": "muonh", "lr": 0.015, "min_lr": 0.015, "lr_decay_style": "constant", "softmax_scale": 0.25},
    **{"qk_layernorm": False, "seq_length": 64, "micro_batch_size": 8, "global_batch_size": 32, "train_iters": 10},
    **{"untie_embeddings_and_output_weights": True, "clip_grad": 1.0, "quiet": True},
}


def documented_loop() -> tuple[str, str]:
    """The first block of docs/api.md, up to the optimizer and from there on."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL)[:1]
    assert len(block.splitlines()) <= 30
    before, line, after = block.partition("optimizer = ")
    return before, line + after


def trained_by_the_trainer(corpus: str, folder: str) -> tuple[Any, list[dict[str, torch.Tensor]], list[float]]:
    """Train; return the initial weights, this rank's micro-batches and the losses."""
    from unittest.mock import patch

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training import loop

    config = toy_config(corpus, Path(folder), **MODEL, **TP2).resolve(world_size=4)
    trainer = loop.Trainer(config, load_tokenizer(config.data.tokenizer_model or ""), None)
    weights = {
        name: value.clone() for name, value in trainer.chunks[0].module.state_dict().items() if value is not None
    }
    seen: list[dict[str, torch.Tensor]] = []
    forward_step = loop.forward_step

    def recording(batches: Any, model: torch.nn.Module, *, draw: Any) -> Any:
        def drawn(source: Any) -> Any:
            seen.append(draw(source))
            return seen[-1]

        return forward_step(batches, model, draw=drawn)

    rows: list[dict[str, Any]] = []
    trainer.writer.write = rows.append  # type: ignore[method-assign,assignment]
    with patch.object(loop, "forward_step", recording):
        trainer.train()
    trainer.close_reports()
    return weights, seen, [row["loss"] for row in rows if "loss" in row]


def compare_with_the_trainer(corpus: str, folder: str) -> list[tuple[float, float]]:
    """Losses of the trainer and of the documented loop, by step."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(1)
    weights, seen, expected = trained_by_the_trainer(corpus, folder)
    parallel_state.destroy_model_parallel()
    batches = iter([(batch["tokens"], batch["labels"], batch["position_ids"]) for batch in seen])
    found: list[float] = []
    space: dict[str, Any] = {"batches": batches}
    before, after = documented_loop()
    exec(before, space)
    space["model"].load_state_dict(weights, strict=False)
    missing = {name for name, _ in space["model"].named_parameters()} - weights.keys()
    assert not missing
    # The loop, with a line that notes what it trained.
    loop = after.replace("    optimizer.step()\n", "    optimizer.step()\n    note(losses)\n")
    assert loop != after

    def note(losses: list[dict[str, torch.Tensor]]) -> None:
        mean = torch.stack([each["loss"] for each in losses]).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        found.append(float(mean) / parallel_state.get_data_parallel_world_size())

    space["note"] = note
    exec(loop, space)
    return list(zip(expected, found, strict=True))


def test_the_documented_loop_trains_as_the_trainer_does(corpus: str, tmp_path: Path) -> None:
    for pairs in run_distributed(compare_with_the_trainer, 4, corpus, str(tmp_path)):
        assert len(pairs) == 10
        assert pairs[-1][0] < 0.97 * pairs[0][0]
        for expected, found in pairs:
            assert found == pytest.approx(expected, rel=1e-6)
