"""Names and shapes of a parameter elsewhere: tables of rules, and how fused weights are cut.

A rule says under which names a parameter of ours is kept elsewhere. Two names share a fused gate and up weight, three a
fused QKV weight: ours holds, per key-value group, the rows of its query heads, of its key and of its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_hyperp.config import Config


@dataclass(frozen=True, slots=True)
class Part:
    """What is kept under one name elsewhere.

    Attributes:
        name: with a ``{}`` for each number of layer and expert.
        factor: the multiplier of ours that is folded into it: a key of :func:`multipliers`, or none.
    """

    name: str
    factor: str = ""


# By our names, numbers left out: decoder.layers.{}.mlp.linear_fc1.weight
Rules = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor elsewhere.

    Attributes:
        name: of it.
        shape: of it.
        factor: it is ours times this.
    """

    name: str
    shape: tuple[int, ...]
    factor: float


class NameMap:
    """Where the parameters of one model are elsewhere.

    Args:
        rules: of the format.
        config: of the model.
        factors: value of each factor that the rules name.
    """

    def __init__(self, rules: Rules, config: Config, factors: Mapping[str, float]) -> None:
        self._rules, self._factors = rules, factors
        model = config.model
        self._groups, self._head = model.num_query_groups, model.kv_channels
        self._queries = model.num_attention_heads // model.num_query_groups

    def knows(self, name: str) -> bool:
        """Whether a rule is about the parameter."""
        return _without_numbers(name) in self._rules

    def pieces(self, name: str, shape: Sequence[int]) -> list[Piece]:
        """Return the tensors that a parameter is elsewhere."""
        parts, numbers = self._rules[_without_numbers(name)], re.findall(r"\.(\d+)(?=\.)", name)
        rows = self._rows(len(parts), shape[0])
        return [
            Piece(part.name.format(*numbers), (count, *shape[1:]), self._factors.get(part.factor, 1.0))
            for part, count in zip(parts, rows, strict=True)
        ]

    def _rows(self, parts: int, rows: int) -> list[int]:
        if parts == 3:
            unit = self._groups * self._head
            return [self._queries * unit, unit, unit]
        return [rows // parts] * parts

    def split(self, tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """Cut a parameter [rows, ...] into its parts; views or copies."""
        if parts != 3:
            return list(tensor.chunk(parts))
        grouped = tensor.view(self._groups, self._queries + 2, self._head, *tensor.shape[1:])
        cut = grouped.split((self._queries, 1, 1), dim=1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in cut]

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo :meth:`split`."""
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            return torch.cat(list(parts))
        rest = parts[0].shape[1:]
        grouped = [part.view(self._groups, -1, self._head, *rest) for part in parts]
        return torch.cat(grouped, dim=1).view(-1, *rest)


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".{}", name)


def multipliers(config: Config) -> dict[str, float]:
    """Return what a plain transformer lacks and weights take over: factors on the residual branches, on the query or
    its norm's gain, and on the final norm's gain.

    Attention elsewhere has the scale 1/sqrt(head size).
    """
    model = config.model
    assert model.residual_multiplier is not None
    assert model.softmax_scale is not None
    assert model.logits_multiplier is not None
    attention = model.softmax_scale * model.kv_channels**0.5
    # Equal but for rounding: at the paper's head size.
    attention = 1.0 if abs(attention - 1.0) < 1e-12 else attention
    return {"residual": model.residual_multiplier, "attention": attention, "logits": model.logits_multiplier}
