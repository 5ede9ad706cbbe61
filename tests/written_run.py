"""Run folders as training writes them, with made-up figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config, ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig

STEP_TOKENS = 4096


def write_run(folder: Path, *, layers: int = 2, experts: int = 0, rows: int = 5, optimizer: Any = "hyperp") -> Path:
    """Write metrics with stability rows, events, a config and a profile."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"iteration": 0, "tokens": 0, "eval_loss": 7.6}]
    for index in range(1, rows + 1):
        position = {"iteration": 10 * index, "tokens": 10 * index * STEP_TOKENS}
        loss = 4 + 3 / index
        lines.append(position | stability_row(layers, index, experts))
        lines.append(
            position
            | {"loss": loss, "lr": 0.05 / index, "grad_norm": 1.0 / index, "tokens_per_s": 1000.0, "mfu": 0.4}
            | {"radius_drift": 3e-8, "skipped": 0}
            | ({"tokens_per_expert": loads(layers, experts), "max_vio": 0.5, "balance_loss": 1.1} if experts else {})
        )
        lines.append(position | {"eval_loss": loss + 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"iteration": at, "time": 1.7e9 + at, "kind": "alarm", "message": f"alarm: loss is {at} (loss > 1 * smoothed)"}
        for at in (10, 20)
    ]
    events.append({"iteration": 20, "time": 1.7e9 + 21, "kind": "saved", "message": "checkpoints/iter_20"})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = Config(
        model=ModelConfig(depth=layers, aspect_ratio=16, seq_length=128),
        moe=MoEConfig(num_experts=experts),
        optimizer=OptimizerConfig(optimizer=optimizer),
        training=TrainingConfig(global_batch_size=32, train_iters=10 * rows),
    )
    (folder / "config.yaml").write_text(arguments.to_yaml(config.resolve(tokenizer_vocab_size=1000)))
    (folder / "profile").mkdir()
    operations = [
        {"operation": "aten::mm", "calls": 12, "self_ms": 75.0},
        {"operation": "b", "calls": 1, "self_ms": 25},
    ]
    (folder / "profile" / "rank0.json").write_text(json.dumps(operations))
    (folder / "profile" / "rank0.trace.json").write_text("{}")
    return folder


def stability_row(layers: int, index: int, experts: int) -> dict[str, Any]:
    """One row of indicators; layer k's attention Z is index + k."""
    row: dict[str, Any] = {"output_z": 50.0 + index, "grad_norm_embedding": 0.1, "grad_norm_mlp": 0.2 * index}
    for key, scale in (("attention_z", 1.0), ("mlp_rms", 0.1), ("angle_mlp", 0.01), ("mlp_outliers", 0.0)):
        values = [scale * (index + layer) for layer in range(layers)]
        row |= {key: math.fsum(values) / layers, f"{key}_per_layer": values}
    row["radius_drift_per_layer"] = [2e-8] * layers
    if experts:
        row |= {"router_z": 9.0, "router_z_per_layer": [9.0] * layers, "max_vio_per_layer": [0.5] * layers}
    return row


def loads(layers: int, experts: int) -> list[list[int]]:
    """Tokens of each expert; the last layer is least even, its expert 0 has three times the mean."""
    even = [[100] * experts for _ in range(layers)]
    rest = (100 * experts - 300) // (experts - 1)
    even[-1] = [300] + [rest] * (experts - 1)
    return even
