"""Does a checkpoint fit a run, and what would change if it went on from there? The configs of both, compared."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.role_laws import TITLES
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
    "optimizer": {"ns_strategy", "ns_backend", "use_checkpoint_opt_param_scheduler"},
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
# Fields that are in iterations, and so in batches: the schedule is kept in sequences.
IN_BATCHES = {"train_iters", "lr_warmup_iters", "lr_wsd_decay_iters"}


def check_compatible(folder: Path, config: Config, *, weights_only: bool = False) -> None:
    """Compare the config in a checkpoint with this run's.

    Args:
        folder: of the checkpoint.
        config: of this run.
        weights_only: whether it has no optimizer state, which any optimizer can begin with.

    Raises:
        UsageError: another architecture, spheres or kind of optimizer state; every field that differs is named.
    """
    from megatron_hyperp.optimizer_options import rule_classes

    saved = arguments.load_stored(folder / CONFIG_FILE)
    # First: another recipe also changes multipliers, which below would look like another architecture.
    there, here = rule_classes(saved.optimizer), rule_classes(config.optimizer)
    other_rules = [
        f"{role} weights: {there[role].name} there, {here[role].name} here"
        for role in there
        if there[role].name != here[role].name
    ]
    if other_rules and not weights_only:
        raise UsageError(
            f"the checkpoint {folder} has the optimizer state of {saved.optimizer.optimizer}, which"
            f" {config.optimizer.optimizer} cannot take over ({'; '.join(other_rules)}); give --optimizer"
            f" {saved.optimizer.optimizer} and its rules, or take the weights alone with --pretrained-checkpoint",
            same_on_all_ranks=True,
        )
    changed = [
        f"{name} is {getattr(getattr(saved, section), name)} there, {getattr(getattr(config, section), name)} here"
        for section, name in SPHERES
        if getattr(getattr(saved, section), name) != getattr(getattr(config, section), name)
    ]
    if changed and config.optimizer.has_spheres:
        raise UsageError(
            f"the checkpoint {folder} has its weights on other spheres: {'; '.join(changed)}; give its values",
            same_on_all_ranks=True,
        )
    then, now = _architecture(saved), _architecture(config)
    differing = [f"{name} is {then[name]} there, {now[name]} here" for name in ARCHITECTURE if then[name] != now[name]]
    if differing:
        raise UsageError(
            f"the checkpoint {folder} has another architecture: {'; '.join(differing)}; give its values, or start from"
            " scratch with another --save, without --load and --pretrained-checkpoint",
            same_on_all_ranks=True,
        )


def _architecture(config: Config) -> dict[str, Any]:
    return {**dataclasses.asdict(config.model), **dataclasses.asdict(config.moe)}


def changed_settings(folder: Path, config: Config) -> list[str]:
    """Return a line for each setting that could change the course of training and differs from the checkpoint's."""
    saved = arguments.load_stored(folder / CONFIG_FILE)
    lines = _learning_rate_lines(saved, config) + _role_lines(saved, config)
    other_batch = saved.training.global_batch_size != config.training.global_batch_size
    for section, names in COURSE.items():
        for item in dataclasses.fields(getattr(config, section)):
            before, now = getattr(getattr(saved, section), item.name), getattr(getattr(config, section), item.name)
            if before != now and item.name not in names and not (other_batch and item.name in IN_BATCHES):
                lines.append(f"{item.name} was {before} in the checkpoint and is now {now}")
    if other_batch:
        lines += _evaluation_lines(saved, config)
    # The order depends on the length of the run, but not on its cut into batches.
    of_order = ("train_tokens ", "seq_length ", "seed ", "data_path ", "mock_data ", "split ")
    if any(line.startswith(of_order) for line in lines):
        lines.append("the order of the data may differ from here on")
    return lines


def weights_notes(folder: Path, config: Config) -> list[str]:
    """Return a line if weights that were trained off the spheres are put on spheres that follow from shapes."""
    saved = arguments.load_stored(folder / CONFIG_FILE)
    there, here = (each.optimizer.has_spheres for each in (saved, config))
    if there or not here or config.optimizer.radius == "from-weights":
        return []
    return [
        f"the matrices of {saved.optimizer.optimizer} in the checkpoint are scaled to the radii of"
        f" {config.optimizer.optimizer}; to keep their norms, convert the checkpoint with tools/convert_checkpoint.py"
        " --radius from-weights and give that flag here too"
    ]


def _learning_rate_lines(saved: Config, config: Config) -> list[str]:
    """Say what the peak learning rate was and is, and what another batch has to do with it."""
    before, now = saved.learning_rate().value, config.learning_rate().value
    line = f"the peak learning rate was {before:g} in the checkpoint and is now {now:g}"
    if saved.batch_tokens == config.batch_tokens:
        return [] if before == now else [line]
    if config.optimizer.lr is not None or not config.has_batch_law:
        return [line if before != now else f"the peak learning rate stays {now:g} with the other batch"]
    factor = math.sqrt(config.batch_tokens / saved.batch_tokens)
    return [
        f"{line}; for {config.batch_tokens:,} tokens per batch instead of {saved.batch_tokens:,} the transfer law has a"
        f" factor of {factor:.4g}, which --use-checkpoint-opt-param-scheduler would leave out"
    ]


def _role_lines(saved: Config, config: Config) -> list[str]:
    """Say whose learning rate was and is another multiple of the peak."""
    then = {rate.role: rate.multiplier for rate in saved.learning_rate().roles}
    return [
        f"the learning rate of the {TITLES[rate.role]} was {then[rate.role]:.4g} times the peak in the checkpoint and"
        f" is now {rate.multiplier:.4g} times"
        for rate in config.learning_rate().roles
        if rate.role in then and then[rate.role] != rate.multiplier
    ]


def _evaluation_lines(saved: Config, config: Config) -> list[str]:
    """Say that evaluations, which are in batches, take another part of the validation set with another batch size."""
    if not (config.training.eval_interval and saved.training.eval_interval):
        return []
    before, now = (each.training.eval_iters * each.training.global_batch_size for each in (saved, config))
    return [] if before == now else [f"an evaluation took {before:,} sequences in the checkpoint and now takes {now:,}"]
