"""The mean of the weights of several checkpoints of one run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_hyperp.config import ModelConfig
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.source import Source
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.sphere import sphere_radius
from megatron_hyperp.optimizer_options import rule_classes
from megatron_hyperp.parameters import role_by_name
from megatron_hyperp.training.checkpoint_folders import complete_checkpoints


def newest_checkpoints(root: str | Path, count: int) -> list[HyperPSource]:
    """Open the newest checkpoints of a folder, oldest first.

    Raises:
        UsageError: there are fewer.
    """
    folders = complete_checkpoints(Path(root))
    if not 2 <= count <= len(folders):
        found = ", ".join(folder.name for folder in folders) or "none"
        raise UsageError(f"--average {count} needs 2 or more, and as many checkpoints in {root}; there are: {found}")
    return [HyperPSource(folder) for folder in folders[-count:]]


class AverageSource(Source):
    """The mean of checkpoints, matrices put back on their spheres.

    The mean of points of a sphere lies inside of it, the deeper the further they are apart. A matrix is used, and
    trained on, at the radius that its learning rate is a fraction of; a norm that follows forgives another one, the
    residual stream does not. So each matrix is scaled to its radius, as the first step of a training would do.

    Args:
        sources: of one model.

    Raises:
        UsageError: their models or spheres differ.
    """

    def __init__(self, sources: Sequence[HyperPSource]) -> None:
        self._sources = list(sources)
        last = self._sources[-1]
        for other in self._sources[:-1]:
            same = (_model(other), other.config.moe) == (_model(last), last.config.moe)
            if not same or other.config.optimizer != last.config.optimizer or other.extras.radii != last.extras.radii:
                raise UsageError(
                    f"{other.folder.name} and {last.folder.name} are of runs with other settings; average checkpoints"
                    " of one run"
                )
        self.config = copy.deepcopy(last.config)
        self.extras = last.extras
        if self.config.optimizer.has_spheres and self.config.optimizer.matrix_split != "fused":
            raise UsageError(
                f"--average keeps fused matrices on their spheres, but those of the run are by"
                f" {self.config.optimizer.matrix_split} (--matrix-split); average runs with fused"
            )

    def dtype(self, name: str) -> torch.dtype:
        """The newest one's."""
        return self._sources[-1].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """Return the mean of a parameter, of the radius that it has in training."""
        total = self._sources[0].read(name).float()
        for source in self._sources[1:]:
            total += source.read(name)
        total /= len(self._sources)
        radius = radius_of(self, name)
        if radius is not None:
            total *= radius / float(torch.linalg.vector_norm(total, dtype=torch.float64))
        return total.to(self.dtype(name))


def _model(source: Source) -> ModelConfig:
    """The settings of a model, less those that older versions of one run did not record."""
    return dataclasses.replace(source.config.model, unpadded_vocab_size=None, max_position_embeddings=None)


def radius_of(source: Source, name: str) -> float | None:
    """Return the radius of a parameter's sphere; None off the sphere."""
    role, options = role_by_name(name), source.config.optimizer
    if not rule_classes(options)[role].on_sphere:
        return None
    if source.extras.radii is not None:
        return source.extras.radii[name]
    return sphere_radius(
        role,
        source.parameters[name].shape,
        radius_scale=options.radius_scale,
        output_init_std=source.config.model.output_init_std,
    )
