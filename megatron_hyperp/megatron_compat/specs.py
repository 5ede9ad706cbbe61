"""Layer specs of Megatron-Core: a part is a ``ModuleSpec`` or, from 0.17 and 0.18 on, a partial of its builder."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec as decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec

__all__ = ["ModuleSpec", "decoder_block_spec", "submodules_of", "with_module"]


def submodules_of(spec: Any) -> Any:
    """Return the parts of a spec that has some."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def with_module(spec: Any, module: type) -> Any:
    """Return a spec with the same parts for another class; a ``ModuleSpec`` is changed in place."""
    if isinstance(spec, partial):
        return partial(module, *spec.args, **spec.keywords)
    spec.module = module
    return spec
