"""Reading and writing torch_dist checkpoints slab by slab: against torch's own writer, damaged, and hostile."""

from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_hyperp.convert.storage import FORMAT, CheckpointReader
from megatron_hyperp.convert.writing import Item, Layout, cuts, write_checkpoint
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import finished_folder
from megatron_hyperp.pickles import load_values

FC1, EXPERT = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.experts.experts.linear_fc2.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
# Of torch's writer, which here needs no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
MASTER = f"optimizer.state.master.{FC1}"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding.word_embeddings.weight": (8, 6),
        FC1: (2, 8, 6),
        PROJ: (2, 6, 4),
        EXPERT: (2, 3, 6, 4),
        MASTER: (2, 8, 6),
        "decoder.final_layernorm.weight": (6,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint that torch wrote, each tensor whole."""
    target = tmp_path / "iter_0000001"
    dcp.save({**state, "rng_state": [1, 2]}, checkpoint_id=target, no_dist=True)
    torch.save({"iteration": 1}, target / "common.pt")
    (target / "metadata.json").write_text(json.dumps(FORMAT))
    return target


def test_what_torch_wrote_is_read_slab_by_slab(folder: Path, state: dict[str, torch.Tensor]) -> None:
    reader = CheckpointReader(folder)
    slabs = list(reader.slabs())
    assert len(slabs) == 1 + 2 + 2 + 6 + 2 + 1
    assert slabs[0].key.startswith("embedding")
    assert slabs[-1].key == "decoder.final_layernorm.weight"
    for slab in slabs:
        whole = state[slab.key]
        assert torch.equal(reader.read(slab), whole[slab.at] if slab.at else whole)
        assert reader.shape(slab) == tuple(whole.shape[len(slab.at) :])
    assert {slab.key for slab in reader.weights()} == set(state) - {MASTER}
    assert reader.common == {"iteration": 1}
    assert list(reader.objects) == ["rng_state"]


def rewrite(reader: CheckpointReader, target: Path, layout: Layout) -> list[int]:
    """Copy a checkpoint, cut anew; return the bytes told of each slab."""
    items = [Item(s, reader.shape(s), reader.dtype(s), lambda s=s: reader.read(s)) for s in reader.slabs()]
    sizes: list[int] = []
    write_checkpoint(target, items, reader.common, layout=layout, advance=sizes.append)
    return sizes


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2, ep=3)])
def test_what_is_written_is_read_back(folder: Path, tmp_path: Path, layout: Layout) -> None:
    first, target = CheckpointReader(folder), tmp_path / "cut"
    target.mkdir()
    sizes = rewrite(first, target, layout)
    second = CheckpointReader(target)
    assert second.common == first.common
    assert list(second.slabs()) == list(first.slabs())
    assert sum(sizes) == sum(first.read(slab).nbytes for slab in first.slabs())
    for slab in first.slabs():
        assert torch.equal(second.read(slab), first.read(slab)), slab
    chunks = {key: len(stored.chunks) for key, stored in second.tensors.items()}
    assert chunks[FC1] == chunks[MASTER] == 2 * 2 * layout.tp
    assert chunks[PROJ] == 2 * layout.tp
    assert chunks[EXPERT] == 2 * 3
    assert len(list(target.glob("*.distcp"))) == layout.pp


def test_cuts_are_those_of_ranks() -> None:
    """Gate rows of both ranks, then up rows of both; columns of the output projection."""
    assert [start for start, _ in cuts(FC1, (8, 6), 2)] == [(0, 0), (2, 0), (4, 0), (6, 0)]
    assert cuts(PROJ, (6, 4), 2) == [((0, 0), (6, 2)), ((0, 2), (6, 2))]
    assert cuts(EXPERT, (6, 4), 2) == [((0, 0), (6, 4))]
    assert cuts("decoder.final_layernorm.weight", (6,), 4) == [((0,), (6,))]


def test_torch_reads_what_is_written(folder: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    target = tmp_path / "cut"
    target.mkdir()
    rewrite(CheckpointReader(folder), target, Layout(tp=2))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=target, no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_missing_layer_is_refused(folder: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(folder)
    items = [Item(s, reader.shape(s), reader.dtype(s), lambda: torch.empty(0)) for s in reader.slabs(EXPERT)][:-2]
    with pytest.raises(UsageError, match="has 4 of 6 layers and experts"):
        write_checkpoint(tmp_path, items, {}, layout=Layout(), advance=lambda _: None)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.proof)],)


def read_everything(folder: Path) -> None:
    reader = CheckpointReader(folder)
    assert reader.common
    for slab in reader.slabs():
        reader.read(slab)


def refuse(folder: Path, names: str) -> None:
    with pytest.raises(UsageError, match=f"holds code objects \\({names}\\)") as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


def test_code_objects_are_named_and_never_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(proof)))
    refuse(folder, "subprocess.call")
    assert not proof.exists()


def test_code_objects_in_the_common_state(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"args": Hostile(proof)}, folder / "common.pt")
    refuse(folder, "[a-z]+.call")  # old pickles have the module's name in Python 2
    # What torch wrote before 1.6 says how much memory is to be taken for it, and is not read at all.
    torch.save({"args": Hostile(proof)}, folder / "common.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"no archive of torch\.save"):
        read_everything(folder)
    assert not proof.exists()


def test_allowed_classes_are_read(tmp_path: Path) -> None:
    torch.save({"size": Layout(tp=2)}, tmp_path / "values.pt")
    with pytest.raises(UsageError, match="code objects"):
        load_values(tmp_path / "values.pt")
    assert load_values(tmp_path / "values.pt", allowed=[Layout])["size"] == Layout(tp=2)


def test_a_name_that_leads_out_of_the_folder(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match="outside of it"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (".metadata", b"\x80", "is damaged"),
        (".metadata", pickle.dumps([1]), "is damaged"),
        (".metadata", None, "cannot be read"),
        ("common.pt", b"no", "is damaged"),
        ("common.pt", None, "has its common state neither in"),
        ("metadata.json", b"{", "is not JSON"),
        ("metadata.json", b'{"sharded_backend": "zarr"}', "only 'torch_dist' is read"),
        ("metadata.json", None, "is no torch_dist checkpoint"),
        ("__0_0.distcp", b"short", "is too short for"),
        ("__0_0.distcp", bytes(10**5), "cannot be read"),
        ("__0_0.distcp", None, "is missing"),
    ],
)
def test_damage_is_one_line(folder: Path, name: str, content: bytes | None, words: str) -> None:
    path = folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    sizes = {"layers": 4, "experts": 6, "split": {"heads": 8}}
    Layout(tp=4, pp=2, ep=3).check(**sizes)
    for layout, words in (
        (Layout(tp=3), "--tp 3 does not divide the heads, 8"),
        (Layout(pp=3), "--pp 3 does not divide the 4 layers"),
        (Layout(ep=4), "--ep 4 does not divide the 6 experts"),
        (Layout(tp=0), "--tp is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            layout.check(**sizes)
    with pytest.raises(UsageError, match="needs experts"):
        Layout(ep=2).check(layers=4, experts=0, split={})


def test_an_unfinished_folder_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with finished_folder(tmp_path / "deep" / "out") as partial:
            (partial / "file").write_text("half")
            raise UsageError("enough")

    with pytest.raises(UsageError, match="enough"):
        fill()
    assert list((tmp_path / "deep").iterdir()) == []
    with finished_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
    with pytest.raises(UsageError, match="is there already"), finished_folder(tmp_path / "out"):
        pass
