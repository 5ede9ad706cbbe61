"""The common state of a checkpoint in its two forms: Megatron-Core's file up to 0.18, its object from 0.19 on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from megatron_hyperp.convert.storage import CheckpointReader, check_format
from megatron_hyperp.errors import UsageError
from megatron_hyperp.megatron_compat import checkpoints
from megatron_hyperp.megatron_compat.checkpoints import COMMON_OBJECT
from megatron_hyperp.training.checkpoint_folders import complete_checkpoints, fault
from megatron_hyperp.training.checkpointing import common_state
from tests.unit.test_convert_storage import Hostile

COMMON = {"progress": {"iteration": 7}, "radii": {"w": 1.5}}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def write(root: Path, common: Any, *, form: str, format_version: int = 1) -> Path:
    """Write a checkpoint with one tensor, its common state as a "file", an "object", or nowhere."""
    folder = root / "iter_0000007"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"w": torch.arange(4.0)}
    stored = state | ({COMMON_OBJECT: [common]} if form == "object" else {})
    # Megatron-Core's planner leaves lists as they are, too.
    dcp.save(stored, checkpoint_id=folder, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    if form == "file":
        torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": format_version})
    )
    (folder / "config.yaml").write_text("model: {}\n")
    return folder


@pytest.mark.parametrize("form", ["file", "object"])
def test_both_forms_are_read(tmp_path: Path, form: str) -> None:
    folder = write(tmp_path, COMMON, form=form)
    assert common_state(folder) == COMMON
    assert CheckpointReader(folder).common == COMMON
    assert fault(folder) is None
    assert complete_checkpoints(tmp_path) == [folder]


def test_neither_form(tmp_path: Path) -> None:
    folder = write(tmp_path, COMMON, form="none")
    assert fault(folder) == "common.pt is missing"
    assert complete_checkpoints(tmp_path) == []
    with pytest.raises(UsageError, match=r"neither in common.pt, as megatron-core 0.16 to 0.18 writes it, nor as the"):
        common_state(folder)


def test_a_later_version_of_the_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, COMMON, form="file", format_version=2)
    for read in (check_format, common_state, CheckpointReader):
        with pytest.raises(
            UsageError, match=r"in version 2 of the format 'torch_dist'; version 1 is read, as megatron"
        ):
            read(folder)


def test_code_objects_in_the_object(tmp_path: Path) -> None:
    folder = write(tmp_path, {"args": Hostile(tmp_path / "proof")}, form="object")
    with pytest.raises(UsageError, match="holds code objects"):
        common_state(folder)
    assert not (tmp_path / "proof").exists()


def test_an_object_that_is_no_common_state(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its common state holds no names with values"):
        common_state(write(tmp_path, [1, 2], form="object"))


def test_versions_that_read_the_file_alone_are_given_one(tmp_path: Path) -> None:
    folder = write(tmp_path, COMMON, form="object")
    with checkpoints._with_common_file(folder, COMMON) as view:
        assert torch.load(view / "common.pt") == COMMON
        assert (view / "__0_0.distcp").read_bytes() == (folder / "__0_0.distcp").read_bytes()
    assert not view.exists()
    assert not (folder / "common.pt").exists()
    torch.save(COMMON, folder / "common.pt")
    with checkpoints._with_common_file(folder, COMMON) as view:
        assert view == folder


def test_what_was_written_is_whole_or_named(tmp_path: Path) -> None:
    folder = write(tmp_path, COMMON, form="file")
    assert checkpoints.missing_data(folder) is None
    data = folder / "__0_0.distcp"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[: size // 2])
    assert (checkpoints.missing_data(folder) or "").startswith(f"__0_0.distcp has {size // 2:,} bytes of ")
    data.unlink()
    assert checkpoints.missing_data(folder) == "__0_0.distcp is missing"
