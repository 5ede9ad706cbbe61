"""Our own checkpoints, as a source of parameters and as what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import __version__, arguments, checksums
from megatron_hyperp.convert.source import (
    Extras,
    Source,
    check_config,
    check_dtype,
    check_extras,
    check_shape,
    slab_of,
    split_sizes,
)
from megatron_hyperp.convert.storage import OPTIMIZER_STATE, CheckpointReader
from megatron_hyperp.convert.writing import Item, Layout, write_checkpoint
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.checkpoint_folders import TRACKER, checkpoint_folder, find_checkpoint
from megatron_hyperp.training.checkpointing import RADII, WEIGHTS_ONLY
from megatron_hyperp.training.logging import CONFIG_FILE


class HyperPSource(Source):
    """One of our checkpoints.

    Args:
        path: folder of one iteration, or of several: then the newest.

    Raises:
        UsageError: there is none, it is damaged, or its tensors are not those of its config.
    """

    def __init__(self, path: str | Path) -> None:
        folder = find_checkpoint(path)
        if folder is None:
            raise UsageError(f"{path} holds no checkpoint of megatron-hyperp; name a --save folder, or iter_... in it")
        self.folder = folder
        self.reader = CheckpointReader(folder)
        self.config = arguments.load_stored(folder / CONFIG_FILE)
        common = self.reader.common
        check_config(self.config, str(folder))
        check_extras(common.get("progress"), common.get(RADII), str(folder))
        self.extras = Extras(
            progress=common.get("progress") or {},
            radii=common.get(RADII),
            tokenizer=self.config.data.tokenizer_model,
        )
        for name, shape in self.parameters.items():
            slab = slab_of(name)
            check_shape(str(folder), name, self.reader.shape(slab), shape.shape)
            check_dtype(str(folder), name, self.reader.dtype(slab))
            layers = self.reader.tensors[slab.key].shape[: len(slab.at)]
            if any(index >= count for index, count in zip(slab.at, layers, strict=True)):
                raise UsageError(f"{folder} lacks {name}, which its config makes; it is not whole")

    @property
    def whole(self) -> bool:
        """Whether the optimizer's state is in it."""
        return any(key.startswith(OPTIMIZER_STATE) for key in self.reader.tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""
        return self.reader.dtype(slab_of(name))

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter."""
        return self.reader.read(slab_of(name))


def check_layout(source: Source, layout: Layout) -> None:
    """Refuse a layout that does not divide the model. Raises: as :meth:`Layout.check`."""
    config = source.config
    layout.check(layers=config.model.num_layers, experts=config.moe.num_experts, split=split_sizes(config))


def write_weights(
    root: Path, source: Source, *, layout: Layout, dtype: torch.dtype | None, advance: Callable[[int], None]
) -> None:
    """Write a checkpoint with weights alone, from which a training starts at its first iteration.

    Args:
        root: folder that is there; the checkpoint is ``iter_0000000`` in it.
        source: to read from.
        layout: to cut for.
        dtype: of the weights; None for the source's.
        advance: told the bytes of each weight.
    """
    items = [
        Item(slab_of(name), shape.shape, dtype or source.dtype(name), _reading(source, name, dtype))
        for name, shape in source.parameters.items()
    ]
    common = {
        WEIGHTS_ONLY: True,
        RADII: source.extras.radii,
        "progress": source.extras.progress,
        "version": __version__,
    }
    _write(root, 0, items, common, arguments.to_yaml(source.config), layout, advance)


def _reading(source: Source, name: str, dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensor = source.read(name)
        return tensor if dtype is None else tensor.to(dtype)

    return read


def write_resharded(root: Path, source: HyperPSource, *, layout: Layout, advance: Callable[[int], None]) -> None:
    """Write the same checkpoint, cut for another layout, the optimizer's state with it.

    Random states belong to the ranks that had them, and are left out: without dropout nothing depends on them. The
    same goes for the history of FP8 scales, which begins anew.
    """
    reader = source.reader
    common = {**reader.common, "layout": None, "fp8_history": False}
    iteration = int(source.folder.name.removeprefix("iter_")) if source.folder.name.startswith("iter_") else 0
    _write(root, iteration, list(stored_items(source)), common, arguments.to_yaml(source.config), layout, advance)


def stored_items(source: HyperPSource) -> Iterator[Item]:
    """Yield every tensor of a checkpoint, the optimizer's state with it."""
    reader = source.reader
    for slab in reader.slabs():
        yield Item(slab, reader.shape(slab), reader.dtype(slab), lambda slab=slab: reader.read(slab))  # type: ignore[misc]


def _write(
    root: Path,
    iteration: int,
    items: list[Item],
    common: dict[str, Any],
    config: str,
    layout: Layout,
    advance: Callable[[int], None],
) -> None:
    folder = checkpoint_folder(root, iteration)
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    write_checkpoint(folder, items, common, layout=layout, advance=advance)
    # Users complete the config of what they import.
    checksums.write_all(folder, but=CONFIG_FILE)
    (root / TRACKER).write_text(f"{iteration}\n")
