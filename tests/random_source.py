"""A model of random weights that nobody trained, as a source of converters."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp.config import Config
from megatron_hyperp.convert.hyperp import write_weights
from megatron_hyperp.convert.source import Extras, Source
from megatron_hyperp.convert.writing import Layout
from tests.toy import toy_config


class RandomSource(Source):
    """Weights of some 0.1, gains of some 1, the same ones for the same name."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        self.config, self._dtype = config, dtype
        self.extras = Extras(progress={"iteration": 7, "consumed_samples": 70, "consumed_tokens": 700})

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        values = 0.1 * torch.randn(self.parameters[name].shape, generator=generator)
        return (values + 1.0 if values.ndim == 1 else values).to(self._dtype)


def model_config(**overrides: Any) -> Config:
    """The toy model, resolved: every size and multiplier explicit."""
    return toy_config("unused", Path("unused"), **overrides).resolve()


def write_random(folder: Path, *, layout: Layout | None = None, **overrides: Any) -> RandomSource:
    """Write a checkpoint of random weights, without optimizer state; return what is in it."""
    source = RandomSource(model_config(**overrides))
    folder.mkdir(parents=True)
    write_weights(folder, source, layout=layout or Layout(), dtype=None, advance=lambda _: None)
    return source
