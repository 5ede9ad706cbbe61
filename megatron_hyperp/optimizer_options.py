"""From a run's config to what the optimizer is asked to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megatron_hyperp.config import Config, OptimizerConfig
from megatron_hyperp.learning_rates import lr_multipliers
from megatron_hyperp.optim.options import HyperPConfig, rules_of
from megatron_hyperp.optim.routing import Heads, Route, route
from megatron_hyperp.optim.rules import UpdateRule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rule_classes(options: OptimizerConfig) -> dict[str, type[UpdateRule]]:
    """Return the update rule of each role.

    Raises:
        UsageError: ``--optimizer-rule`` or ``--router-rule`` names no rule.
    """
    return rules_of(options.optimizer, rule=options.optimizer_rule, router_rule=options.router_rule)


def optimizer_options(config: Config, radii: Mapping[str, float] | None = None) -> HyperPConfig:
    """Return the optimizer's options for a resolved config.

    Args:
        config: resolved.
        radii: of spheres that do not follow from shapes, by the parameter's name.
    """
    options = config.optimizer
    return HyperPConfig(
        lr=config.learning_rate().value,
        min_lr=options.min_lr or 0.0,
        optimizer=options.optimizer,
        rule=options.optimizer_rule,
        router_rule=options.router_rule,
        lr_mults=lr_multipliers(config),
        weight_decay=options.weight_decay or 0.0,
        clip_grad=options.clip_grad,
        momentum=options.muon_momentum,
        nesterov=options.muon_nesterov,
        momentum_dtype=DTYPES[options.momentum_dtype],
        adam_betas=(options.adam_beta1, options.adam_beta2),
        adam_eps=options.adam_eps,
        ns_steps=options.ns_steps,
        ns_coefficients=options.ns_coefficients,
        ns_dtype=options.ns_dtype,
        ns_form=options.ns_form,
        ns_backend=options.ns_backend,
        ns_strategy=options.ns_strategy,
        matrix_split=options.matrix_split,
        zero_gradients=options.zero_gradients,
        radius_scale=options.radius_scale,
        output_init_std=config.model.output_init_std,
        radii=radii,
    )


def heads_of(config: Config) -> Heads:
    """Return how the model's QKV weights are laid out."""
    model = config.model
    return Heads(model.kv_channels, model.num_attention_heads // model.num_query_groups)


def routes_of(
    config: Config,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    radii: Mapping[str, float] | None = None,
) -> list[Route]:
    """Give every parameter its rule by a resolved config; see :func:`~megatron_hyperp.optim.routing.route`."""
    return route(
        named_parameters,
        optimizer_options(config, radii),
        tensor_parallel_size=config.parallel.tensor_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
        heads=heads_of(config),
    )
