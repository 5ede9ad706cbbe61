"""One training of a sweep: its config, the key that it is known by, and its row in the table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_hyperp import estimate
from megatron_hyperp.config import Config
from megatron_hyperp.learning_rates import lr_multipliers

# The contract with tools/fit_scaling.py.
CONTRACT = ("method", "depth", "tokens", "flops", "lr", "loss")
# Fields that the contract's columns tell already.
TOLD = {"depth", "num_layers", "train_tokens", "lr"}
# Sections that decide what is learned, less their fields that do not, or that others follow from or stand for.
COURSE: dict[str, set[str]] = {
    "model": {
        *("depth", "aspect_ratio", "make_vocab_size_divisible_by"),
        *("unpadded_vocab_size", "max_position_embeddings"),
    },
    "moe": set(),
    "parallel": {"distributed_timeout_minutes", "overlap_grad_reduce", "overlap_param_gather"},
    "optimizer": {"lr", "use_checkpoint_opt_param_scheduler"},
    "data": {"data_path", "tokenizer_model", "prepend_bos", "data_cache_path", "num_workers"},
    "training": {"exit_interval", "eval_interval"},
    # A point's folders for checkpoints are the sweep's; what it starts from is its own.
    "checkpoint": {"save", "load", "save_interval", "keep", "async_save"},
}
KEY_LENGTH = 10


@dataclass(frozen=True)
class Point:
    """A training.

    Attributes:
        method: label in the table.
        settings: the names and values by which it differs from the sweep's base.
        config: not yet resolved; what the trainer gets.
        resolved: what the trainer makes of it.
    """

    method: str
    settings: dict[str, Any]
    config: Config
    resolved: Config

    @cached_property
    def key(self) -> str:
        """Hash of what decides the result, but for the text itself: fields that are not at their defaults.

        A field that is added to the config later, with a default that changes nothing, leaves keys as they are.
        """
        config = self.resolved
        course: dict[str, Any] = {"lr": config.learning_rate().value}
        if config.recipe.width_mup:
            course["base_hidden_size"] = config.transfer.base_hidden_size
        # Elsewhere they follow from fields that are below.
        if config.optimizer.lr_exponents or config.preset is not None:
            course["lr_multipliers"] = lr_multipliers(config)
        for section, left_out in COURSE.items():
            values = getattr(config, section)
            for item in dataclasses.fields(values):
                value = getattr(values, item.name)
                # A derived number that is 0, as those of experts in a dense model are, has nothing to tell either.
                absent = value in (item.default, []) or (value == 0 and "derived" in item.metadata)
                if item.name not in left_out and not absent:
                    course[item.name] = value
        text = json.dumps({name: plain(value) for name, value in course.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    @cached_property
    def name(self) -> str:
        """Name of the run folder: readable, and as unique as the key."""
        config, moe = self.resolved, self.resolved.moe
        words = [config.optimizer.optimizer, f"d{config.model.num_layers}", f"w{config.model.hidden_size}"]
        words += [f"e{moe.num_experts}", f"k{moe.moe_router_topk}"] if moe.num_experts else []
        words += [f"{config.training.train_tokens / 1e6:.4g}M", f"lr{config.learning_rate().value:.4g}"]
        return "-".join([*words, f"s{config.training.seed}", self.key])

    def row(self, columns: Sequence[str]) -> dict[str, str]:
        """What the table tells of the training before it has a result.

        Args:
            columns: names of fields, or of settings that are no fields.
        """
        config, tokens = self.resolved, self.resolved.training.train_tokens
        row: dict[str, Any] = {
            "method": self.method,
            "depth": config.model.num_layers,
            "tokens": tokens,
            "flops": round(estimate.train_flops_per_token(config.model, config.moe) * tokens),
            "lr": config.learning_rate().value,
        }
        row.update({name: self._value(name) for name in columns if name not in TOLD})
        return {name: plain(value) for name, value in row.items()}

    def _value(self, name: str) -> Any:
        if name == "eta0":
            return None if self.resolved.optimizer.lr is not None else self.resolved.eta0
        for section in dataclasses.fields(self.resolved):
            values = getattr(self.resolved, section.name)
            if hasattr(values, name):
                return getattr(values, name)
        return self.settings.get(name)


def key_of(name: str) -> str:
    """The key in the name of a run."""
    return name.rpartition("-")[2]


def plain(value: Any) -> str:
    """Text of a value: numbers of at most ten digits, large whole ones with all of them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.10g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
