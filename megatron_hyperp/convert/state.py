"""Files stored with exported weights, for the way back: our config, the progress, radii, what undoes the folding, and
the padding of the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import __version__, arguments
from megatron_hyperp.convert.source import Source, check_extras, check_shape
from megatron_hyperp.convert.tensor_files import TensorReader
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import read_json

CONFIG, STATE, UNDO, PADDING = "hyperp_config.yaml", "hyperp.json", "hyperp_undo", "hyperp_padding"


def write_state(folder: Path, source: Source) -> None:
    """Write config, progress and radii."""
    state = {"version": __version__, "progress": source.extras.progress, "radii": source.extras.radii}
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    (folder / CONFIG).write_text(arguments.to_yaml(source.config), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read progress and radii; empty if the weights are not of ours.

    Raises:
        UsageError: it is damaged.
    """
    if not (folder / CONFIG).is_file():
        return {}
    state = read_mapping(folder / STATE)
    check_extras(state.get("progress"), state.get("radii"), str(folder / STATE))
    return state


def check_undo(undo: TensorReader | None, name: str, shape: tuple[int, ...]) -> None:
    """See that corrections of a weight, if there are any, are what folding writes.

    Raises:
        UsageError: they are not.
    """
    if undo is not None and name in undo:
        check_shape(str(undo.folder), f"the correction of {name}", undo.spec(name).shape, shape)
        if undo.spec(name).dtype != torch.int8:
            raise UsageError(f"{undo.folder} has a correction of {name} that is not in int8; take another copy")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that maps names to values.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({' '.join(str(error).split())}); take another copy") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no names with values; take another copy")
    return content
