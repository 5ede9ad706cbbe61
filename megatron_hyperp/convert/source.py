"""What converters read from: a model's config, and its parameters by the names they have in our model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megatron_hyperp.arguments import DERIVED_SIZES
from megatron_hyperp.config import Config
from megatron_hyperp.convert.slabs import Slab
from megatron_hyperp.errors import UsageError
from megatron_hyperp.planning.inventory import Shape, shapes
from megatron_hyperp.resolve import check_ranges

# Norms are stored under the names that TransformerEngine's layers, fused with the product behind them, give them.
_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_MOST_MATRICES = 10**6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def slab_of(name: str) -> Slab:
    """Return where checkpoints keep a parameter, by its name in the whole model."""
    numbers = tuple(map(int, re.findall(r"\.(\d+)(?=\.)", name)))
    key = re.sub(r"\.local_experts\.\d+", ".experts", re.sub(r"^(decoder\.layers)\.\d+", r"\1", name))
    for ours, stored in _STORED_NAMES.items():
        key = re.sub(rf"(?<=layers\.){re.escape(ours)}$", stored, key)
    return Slab(key, numbers)


@dataclass(slots=True)
class Extras:
    """What comes with weights.

    Attributes:
        progress: where the training stood, as in :class:`megatron_hyperp.training.checkpointing.Progress`.
        radii: of matrices whose spheres are those of their weights at an import, by name; None if they follow from
            shapes.
        tokenizer: file of the tokenizer, if it came with the weights.
        foreign: whether the weights were never on spheres.
    """

    progress: dict[str, int] = field(default_factory=dict)
    radii: dict[str, float] | None = None
    tokenizer: str | None = None
    foreign: bool = False


class Source(ABC):
    """A checkpoint to read from, in any format.

    Attributes:
        config: what is known of the model; its sizes and multipliers are explicit.
        extras: what comes with the weights.
    """

    config: Config
    extras: Extras

    @cached_property
    def parameters(self) -> Mapping[str, Shape]:
        """Every parameter of the model, by name."""
        return {shape.name: shape for shape in shapes(self.config)}

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read a parameter: its global shape, contiguous, free to be changed."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(
            torch.Size(shape.shape).numel() * self.dtype(name).itemsize for name, shape in self.parameters.items()
        )


def check_config(config: Config, where: str) -> None:
    """See that a config which came with weights is that of a model: its sizes whole, and of a sane number.

    Raises:
        UsageError: one is missing, out of range, or does not divide another.
    """
    model, moe = config.model, config.moe
    try:
        check_ranges(config)
    except UsageError as error:
        raise UsageError(f"{where} has a config that is damaged ({error}); take another copy") from error
    names = [*DERIVED_SIZES, "vocab_size"]
    lacking = [name for name in names if not getattr(model, name)]
    lacking += [
        name for name in ("softmax_scale", "residual_multiplier", "logits_multiplier") if not getattr(model, name)
    ]
    lacking += ["num_experts"] if moe.num_experts is None else []
    if moe.num_experts:
        lacking += [name for name in ("moe_router_topk", "moe_ffn_hidden_size") if not getattr(moe, name)]
        shared = "moe_shared_expert_intermediate_size"
        lacking += [shared] if getattr(moe, shared) is None else []
    if lacking:
        raise UsageError(f"{where} has a config without {', '.join(lacking)}; take another copy")
    if model.num_attention_heads % model.num_query_groups or (
        moe.num_experts and moe.moe_router_topk > moe.num_experts
    ):
        raise UsageError(f"{where} has a config whose heads or experts do not go together; take another copy")
    if model.num_layers * max(1, moe.num_experts) > _MOST_MATRICES:
        raise UsageError(
            f"{where} has a config of {model.num_layers:,} layers with {moe.num_experts:,} experts each; at most"
            f" {_MOST_MATRICES:,} experts are read"
        )


def check_extras(progress: object, radii: object, where: str) -> None:
    """See that what came with weights is of the types of :class:`Extras`.

    Raises:
        UsageError: it is not.
    """
    counts = progress is None or (isinstance(progress, dict) and all(type(value) is int for value in progress.values()))
    lengths = radii is None or (isinstance(radii, dict) and all(type(value) is float for value in radii.values()))
    if not (counts and lengths):
        raise UsageError(f"{where} has a progress or radii that are damaged; take another copy")


def check_dtype(where: str, name: str, found: torch.dtype) -> None:
    """Refuse a weight of other numbers than :data:`DTYPES`.

    Raises:
        UsageError: it is one.
    """
    if found not in DTYPES.values():
        raise UsageError(
            f"{where} has {name} in {str(found).removeprefix('torch.')}; weights are read in {', '.join(DTYPES)}"
        )


def check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the config says.

    Raises:
        UsageError: it has one.
    """
    if tuple(found) != tuple(expected):
        raise UsageError(
            f"{where} has {name} of shape {list(found)}, where its config makes {list(expected)} of it; weights and"
            " config are of different models"
        )


def split_sizes(config: Config) -> dict[str, int]:
    """Sizes that tensor-parallel ranks share, by what they are."""
    model, moe = config.model, config.moe
    sizes = {
        "query heads": model.num_attention_heads,
        "key-value heads": model.num_query_groups,
        "rows of the embedding": model.vocab_size,
    }
    shared = moe.moe_shared_expert_intermediate_size
    if not moe.num_experts:
        sizes["FFN size"] = model.ffn_hidden_size
    elif shared:
        sizes["FFN size of the shared expert"] = shared
    return sizes
