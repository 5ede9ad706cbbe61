"""Does a checkpoint fit a run, and what would change if it went on from there? The configs of both, compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.logging import CONFIG_FILE

# What must agree for weights to fit: everything the forward pass depends on.
ARCHITECTURE = (
    *arguments.DERIVED_SIZES,
    "vocab_size",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "norm_epsilon",
    "rotary_base",
    "softmax_scale",
    "residual_multiplier",
    "logits_multiplier",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_gate",
)
# Settings that fix the spheres: on other ones a run would rescale every weight at its first step.
SPHERES = (
    ("optimizer", "radius"),
    ("optimizer", "radius_scale"),
    ("optimizer", "matrix_split"),
    ("model", "output_init_std"),
)
# Sections that decide the course of training, with their fields that do not.
COURSE = {
    "model": {
        *(*ARCHITECTURE, "depth", "aspect_ratio", "make_vocab_size_divisible_by", "embedding_init_std"),
        *("unpadded_vocab_size", "max_position_embeddings"),
    },
    "moe": {*ARCHITECTURE, "moe_sparsity", "moe_topk", "moe_shared_expert", "moe_token_dispatcher_type"},
    "optimizer": {"ns_strategy", "ns_backend"},
    "transfer": set[str](),
    "data": {"data_cache_path", "num_workers"},
    "training": {
        *("micro_batch_size", "exit_interval", "exit_duration_in_mins", "eval_interval", "eval_iters"),
        "transformer_impl",
        *("recompute_granularity", "recompute_method", "recompute_num_layers"),
        *("attention_backend", "gradient_accumulation_fusion"),
        *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"),
        *("deterministic_mode", "check_weight_hash_across_dp_replicas_interval"),
    },
}


def check_compatible(folder: Path, config: Config, *, weights_only: bool = False) -> None:
    """Compare the config in a checkpoint with this run's.

    Args:
        folder: of the checkpoint.
        config: of this run.
        weights_only: whether it has no optimizer state, which any optimizer can begin with.

    Raises:
        UsageError: another architecture, spheres or kind of optimizer state; every field that differs is named.
    """
    from megatron_hyperp.optim.routing import RULES, SPHERE_RULES

    saved = arguments.load_yaml(folder / CONFIG_FILE)
    # First: another recipe also changes multipliers, which below would look like another architecture.
    there, here = saved.optimizer.optimizer, config.optimizer.optimizer
    if RULES[there] != RULES[here] and not weights_only:
        raise UsageError(
            f"the checkpoint {folder} has the optimizer state of {there}, which {here} cannot take over;"
            f" give --optimizer {there}, or start anew",
            same_on_all_ranks=True,
        )
    changed = [
        f"{name} is {getattr(getattr(saved, section), name)} there, {getattr(getattr(config, section), name)} here"
        for section, name in SPHERES
        if getattr(getattr(saved, section), name) != getattr(getattr(config, section), name)
    ]
    if changed and set(RULES[here].values()) & set(SPHERE_RULES):
        raise UsageError(
            f"the checkpoint {folder} has its weights on other spheres: {'; '.join(changed)}; give its values",
            same_on_all_ranks=True,
        )
    then, now = _architecture(saved), _architecture(config)
    differing = [f"{name} is {then[name]} there, {now[name]} here" for name in ARCHITECTURE if then[name] != now[name]]
    if differing:
        raise UsageError(
            f"the checkpoint {folder} has another architecture: {'; '.join(differing)}; give its values, or start anew"
            " with another --save and no --load",
            same_on_all_ranks=True,
        )


def _architecture(config: Config) -> dict[str, Any]:
    return {**dataclasses.asdict(config.model), **dataclasses.asdict(config.moe)}


def changed_settings(folder: Path, config: Config) -> list[str]:
    """Return a line for each setting that could change the course of training and differs from the checkpoint's."""
    saved = arguments.load_yaml(folder / CONFIG_FILE)
    before, now = saved.learning_rate().value, config.learning_rate().value
    lines = [] if before == now else [f"the peak learning rate was {before:g} in the checkpoint and is now {now:g}"]
    for section, names in COURSE.items():
        for item in dataclasses.fields(getattr(config, section)):
            before, now = getattr(getattr(saved, section), item.name), getattr(getattr(config, section), item.name)
            if before != now and item.name not in names:
                lines.append(f"{item.name} was {before} in the checkpoint and is now {now}")
    if any(line.startswith(("train_iters ", "global_batch_size ", "seed ", "data_path ", "split ")) for line in lines):
        lines.append("the order of the data may differ from here on")
    return lines


def is_of_run(folder: Path, config: Config) -> bool:
    """Whether a run with the same run folder wrote the checkpoint, so that its metrics go on."""
    there = Path(arguments.load_yaml(folder / CONFIG_FILE).logging.run_dir)
    return there.resolve() == Path(config.logging.run_dir).resolve()
