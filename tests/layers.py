"""Trainings on either kind of layers, by the same functions on CPU (TransformerEngine's stand-in) and on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.run_distributed import free_port
from tests.stand_ins import stand_in_for_transformer_engine
from tests.toy import rows_of_training, toy_config

Cases = dict[str, dict[str, Any]]
Rows = dict[str, list[dict[str, Any]]]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """The training losses among rows of metrics."""
    return [row["loss"] for row in rows if "loss" in row]


def _begin(stand_in: bool) -> None:
    if stand_in:
        stand_in_for_transformer_engine()
    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(2)


def train_all(prefix: str, folder: str, cases: Cases, stand_in: bool) -> Rows:
    """Train each case on new ranks; return its rows of metrics."""
    _begin(stand_in)
    return {title: rows_of_training(toy_config(prefix, Path(folder), **fields)) for title, fields in cases.items()}


def train_and_save(prefix: str, folder: str, runs: Cases, stand_in: bool) -> None:
    """Run whole trainings on one new rank, with their files in a folder each."""
    if stand_in:
        stand_in_for_transformer_engine()
    from megatron_hyperp.training.pretrain import pretrain

    for name, fields in runs.items():
        os.environ["MASTER_PORT"] = str(free_port())
        pretrain(toy_config(prefix, Path(folder) / name, **fields), world_size=1)


def first_gradients(prefix: str, folder: str, cases: Cases, stand_in: bool) -> dict[str, tuple[float, dict[str, Any]]]:
    """Run the first batch of each case on a new rank; return its loss and the gradients of matrices, fp32 on CPU."""
    _begin(stand_in)
    from megatron.core import parallel_state

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.parameters import named_parameters
    from megatron_hyperp.training.loop import Trainer

    found = {}
    for title, fields in cases.items():
        config = toy_config(prefix, Path(folder), **fields).resolve()
        assert config.data.tokenizer_model is not None
        trainer = Trainer(config, load_tokenizer(config.data.tokenizer_model), None)
        total, tokens = trainer._train_batch(trainer._batches(trainer.train_set, 0)).tolist()
        named = [pair for chunk in trainer.chunks for pair in named_parameters(chunk)]
        gradients = {name: item.main_grad.float().cpu() for name, item in named if item.ndim == 2}  # type: ignore[attr-defined]
        found[title] = total / tokens, gradients
        trainer.close_reports()
        parallel_state.destroy_model_parallel()
    return found


def recipes_entered(prefix: str, folder: str, cases: Cases) -> list[tuple[str, str]]:
    """Train a step of each case on the stand-in; return name and formats of the recipe that its layers saw."""
    _begin(stand_in=True)
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # type: ignore[import-not-found]

    found = []
    for fields in cases.values():
        FP8GlobalStateManager.entered.clear()
        rows_of_training(toy_config(prefix, Path(folder), **fields))
        recipe = FP8GlobalStateManager.entered[0]
        found.append((type(recipe).__name__, recipe.fp8_format.name))
    return found
