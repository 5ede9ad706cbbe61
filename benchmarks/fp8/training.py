"""Trainings of the quickstart's model under every recipe of FP8, and what rounding does to trained weights."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from megatron_hyperp import arguments, device
from megatron_hyperp.model.fp8 import quantized, sphere_scale
from megatron_hyperp.numerics.fp8 import LARGEST, round_trip
from megatron_hyperp.training.logging import read_metrics

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
FP8 = {"fp8_format": "hybrid", "fp8_emulation": True}
# Settings of the section "training", by the case's name. The first is what the others are compared with.
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "tensorwise": FP8,
    "rowwise": {**FP8, "fp8_recipe": "rowwise"},
    "blockwise": {**FP8, "fp8_recipe": "blockwise"},
    "mxfp8": {**FP8, "fp8_recipe": "mxfp8"},
    "delayed": {**FP8, "fp8_recipe": "delayed"},
    "delayed, 1024 steps": {
        **FP8,
        **{"fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    },
    "sphere": {**FP8, "fp8_weight_scale": "sphere"},
    "tensorwise, e4m3 gradients": {**FP8, "fp8_format": "e4m3"},
}
# Losses of so many last steps are averaged: those of single steps scatter by 2%.
LAST = 10


def train(
    case: str, *, bf16: bool, iterations: int, seed: int, data_path: str, tokenizer_model: str
) -> tuple[Row, list[Row]]:
    """Train one case on this process alone, whose process group exists.

    Args:
        case: a key of :data:`CASES`.
        bf16: as ``--bf16``.
        iterations: steps, and length of the schedule.
        seed: of weights and of the order of the text.
        data_path: prefix of the corpus.
        tokenizer_model: its tokenizer.

    Returns:
        Losses and drift; for every kind of matrix, :func:`weight_errors`.
    """
    from megatron.core import parallel_state

    from megatron_hyperp.training.loop import Trainer
    from megatron_hyperp.training.preflight import check

    config = arguments.load_yaml(ROOT / "examples" / "configs" / "quickstart.yaml")
    config.data.data_path, config.data.tokenizer_model = [data_path], tokenizer_model
    training = config.training
    training.train_iters, training.eval_interval, training.eval_iters = iterations, iterations, 16
    training.bf16, training.seed = bf16, seed
    for name, value in CASES[case].items():
        setattr(training, name, value)
    config.logging.log_interval, config.logging.stability_interval, config.logging.quiet = 1, 0, True
    with tempfile.TemporaryDirectory() as folder:
        config.logging.run_dir = folder
        config, tokenizer, *_ = check(config, 1)
        trainer = Trainer(config, tokenizer, None)
        trainer.train()
        trainer.close_reports()
        rows = read_metrics(folder)
    errors = weight_errors(trainer.chunks[0], config.optimizer.radius_scale)
    parallel_state.destroy_model_parallel()
    steps = [row for row in rows if "loss" in row]
    which = {"case": case, "precision": "bf16" if bf16 else "fp32", "seed": seed, "iterations": iterations}
    result = {
        **which,
        "loss": mean(row["loss"] for row in steps[-LAST:]),
        "held_out": [row["eval_loss"] for row in rows if "eval_loss" in row][-1],
        "radius_drift": max(row["radius_drift"] for row in steps),
        "skipped": steps[-1]["skipped"],
    }
    return result, [{**which, **row} for row in errors]


def weight_errors(model: torch.nn.Module, radius_scale: float) -> list[Row]:
    """Round the matrices of transformer layers to e4m3, with current scales and with those of their spheres.

    Args:
        model: whole, on this rank.
        radius_scale: factor on radii.

    Returns:
        A row for each kind of matrix, with means over layers: relative RMS errors, shares of elements that are clipped;
        and the largest element of all layers over the RMS.
    """
    measured: dict[str, list[list[float]]] = {}
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if not kind.startswith("linear_") or parameter.ndim != 2:
            continue
        weight = parameter.detach().float()
        norm, largest = float(weight.norm()), float(weight.abs().max())
        static = sphere_scale(tuple(weight.shape), radius_scale)
        measured.setdefault(kind, []).append(
            [
                float((quantized(weight, "e4m3", "tensorwise") - weight).norm()) / norm,
                float((round_trip(weight, "e4m3", torch.tensor(static)) - weight).norm()) / norm,
                float((weight.abs() * static > LARGEST["e4m3"]).float().mean()),
                largest * math.sqrt(weight.numel()) / norm,
            ]
        )
    rows = []
    for kind, of_layers in measured.items():
        current, sphere, clipped, largest_of = zip(*of_layers, strict=True)
        row = {"kind": kind, "current": mean(current), "sphere": mean(sphere), "clipped": mean(clipped)}
        rows.append({**row, "largest": max(largest_of)})
    return rows


def start() -> None:
    """Join a process group of one rank."""
    device.adapt_megatron()
    device.init_process_group(10)
