"""YAML of others: plain values alone, and no more of them than the file is worth.

PyYAML's safe loader runs no code, but lets ten short lines stand for a billion values: an alias costs nothing until
what it stands for is copied or printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# Far above any config or sweep.
_LARGEST, _MOST_NODES, _DEEPEST = 2**22, 100_000, 50


class _Loader(yaml.SafeLoader):
    """Counts values, those behind aliases each time that they are named."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> int:
        children: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        # A child without a size is the node that it is in.
        size = 1 + sum(self._sizes.get(id(child), _MOST_NODES) for child in children)
        if size > _MOST_NODES:
            raise ValueError(f"it stands for more than {_MOST_NODES:,} values")
        return size


def read(path: Path) -> Any:
    """Read a file, or a pipe such as a shell's <(...). Raises: OSError: it cannot be read; else as :func:`load`."""
    with path.open(encoding="utf-8") as stream:
        return load(stream.read(_LARGEST + 1))


def load(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: it is not YAML, or asks for more than plain values of a sane number; the message is one line.
    """
    if len(text) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST:,} characters")
    try:
        # A safe loader.
        return yaml.load(text, _Loader)  # nosec B506
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        # PyYAML's constructors take tags at their word: !!int "", !!timestamp x.
        raise ValueError(f"a value is not what its tag says ({type(error).__name__})") from error
