"""What converters read from: a model's config, and its parameters by the names they have in our model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megatron_hyperp.config import Config
from megatron_hyperp.convert.storage import Slab
from megatron_hyperp.errors import UsageError
from megatron_hyperp.planning.inventory import Shape, shapes

# Norms are stored under the names that TransformerEngine's layers, fused with the product behind them, give them.
_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
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
