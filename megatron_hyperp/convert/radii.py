"""Radii of spheres from weights, for continued training of a model that was trained elsewhere."""

from __future__ import annotations

import torch

from megatron_hyperp.convert.source import Source
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optimizer_options import rule_classes
from megatron_hyperp.parameters import role_by_name


def take_radii_from_weights(source: Source) -> None:
    """Measure the norm of every matrix that is trained on a sphere, and say so in the source's config.

    Raises:
        UsageError: a matrix is zero, or not finite.
    """
    options = source.config.optimizer
    options.radius = "from-weights"
    radii, rules = {}, rule_classes(options)
    for name in source.parameters:
        if rules[role_by_name(name)].on_sphere:
            radii[name] = float(torch.linalg.vector_norm(source.read(name), dtype=torch.float64))
            if not 0.0 < radii[name] < float("inf"):
                raise UsageError(f"{name} has the norm {radii[name]:g}, which is no radius; leave out --radius")
    source.extras.radii = radii
