"""Folders of others: checkpoints and models of which one file is damaged, gone, or not a file."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_hyperp.convert import hf_config, megatron_arguments
from megatron_hyperp.convert.convert import Job, convert
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from tests.fuzz import inputs
from tests.fuzz.profiles import fuzzed, run
from tests.fuzz.strategies import EDGES, TEXT, VALUES, changed, damaged, json_files

# Of torch's writer, which here needs no process group.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# What a file may become: gone, a folder, a pipe that nobody writes to, a link to nothing or to what never ends.
MISHAPS = ["gone", "folder", "pipe", "dangling", "endless"]


@contextmanager
def replaced(path: Path, content: bytes | str) -> Iterator[None]:
    """Put a content, or a mishap, in place of a file, and the file back at the end."""
    before = path.read_bytes()
    path.unlink()
    try:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content in ("dangling", "endless"):
            path.symlink_to("/nowhere" if content == "dangling" else "/dev/zero")
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "hf": inputs.write_hf(root / "hf"),
        "hf moe": inputs.write_hf(root / "moe", **inputs.EXPERTS),
        "hyperp": inputs.write_hyperp(root / "ours"),
        "megatron-lm": inputs.write_megatron(root / "megatron"),
        "archscale": inputs.write_archscale(root / "archscale").parent,
    }


KINDS = ["hf", "hf moe", "hyperp", "megatron-lm", "archscale"]


def read(kind: str, folder: Path) -> None:
    if kind == "archscale":
        inputs.read_source(kind, folder / "x.pth", str(folder / "config.yaml"))
    else:
        inputs.read_source(kind.split()[0], folder)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_ones_are_read(folders: dict[str, Path], kind: str) -> None:
    read(kind, folders[kind])
    if kind == "hyperp":
        inputs.read_checkpoint(folders[kind])


@pytest.mark.parametrize("kind", KINDS)
@fuzzed(40, slowness=5)
@given(data=st.data())
def test_one_file_is_damaged(folders: dict[str, Path], kind: str, data: st.DataObject) -> None:
    folder = folders[kind]
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    # A config that the command line names may be a shell's <(...), and is waited for.
    mishaps = [each for each in MISHAPS if path.name != "config.yaml" or each not in ("pipe", "endless")]
    content = data.draw(st.one_of(damaged(path.read_bytes()), st.sampled_from(mishaps)))
    with replaced(path, content):
        run(f"{kind}, damaged file", read, kind, folder, refusals=(UsageError,))
        if kind == "hyperp":
            run("checkpoint, damaged file", inputs.read_checkpoint, folder, refusals=(UsageError,))


NUMBERS = st.one_of(st.sampled_from(EDGES), st.integers(-3, 12), st.floats(), st.none(), TEXT)
FIELDS = ["size", "chunks", "chunk.sizes", "chunk.offsets", "dtype", "storage.offset", "storage.length", "storage.path"]


CHANGES = st.tuples(st.sampled_from(FIELDS), st.integers(0, 20), st.one_of(NUMBERS, VALUES))


def index_with(folder: Path, changes: list[tuple[str, int, Any]]) -> bytes:
    """A checkpoint's index in which some fields have other values."""
    metadata = inputs.metadata(folder)
    for field, which, value in changes:
        entries = [entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "chunks")]
        entry = entries[which % len(entries)]
        storage = list(metadata.storage_data.values())[which % len(metadata.storage_data)]
        shape = value if isinstance(value, list) else [value] * len(entry.size)
        if field == "size":
            entry.size = shape
        elif field == "chunks":
            entry.chunks = shape
        elif field.startswith("chunk.") and entry.chunks and hasattr(entry.chunks[0], "sizes"):
            object.__setattr__(entry.chunks[0], field.removeprefix("chunk."), shape)
        elif field == "dtype":
            object.__setattr__(entry.properties, "dtype", value)
        elif field.startswith("storage."):
            name = {"path": "relative_path"}.get(field.split(".")[1], field.split(".")[1])
            object.__setattr__(storage, name, value)
    return pickle.dumps(metadata)


@fuzzed(100, slowness=2)
@given(
    st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 20), st.one_of(NUMBERS, VALUES)), min_size=1, max_size=3)
)
@example([("size", 0, 2**60)])
@example([("size", 3, 2**60)])
@example([("size", 0, [2**60, 0])])
@example([("size", 0, [2**32, 2**32])])
@example([("chunk.sizes", 0, 2**60), ("size", 0, 2**60)])
@example([("storage.length", 0, 2**60)])
@example([("storage.offset", 0, -1)])
@example([("storage.path", 0, "../../../../etc/passwd")])
@example([("storage.path", 0, "/dev/zero")])
@example([("storage.path", 0, "x" * 3000)])
@example([("dtype", 0, "torch.float32")])
@example([("chunks", 0, []), ("chunk.sizes", 0, None)])
def test_index_of_a_checkpoint(folders: dict[str, Path], changes: list[tuple[str, int, Any]]) -> None:
    folder = folders["hyperp"]
    with replaced(folder / ".metadata", index_with(folder, changes)):
        run("checkpoint, index", read, "hyperp", folder, refusals=(UsageError,))


HF: dict[str, Any] = hf_config.to_json(inputs.model_config(**inputs.TINY), dtype="float32", bos=None, eos=1)
MOE: dict[str, Any] = hf_config.to_json(
    inputs.model_config(**inputs.TINY, **inputs.EXPERTS), dtype="float32", bos=None, eos=1
)


@fuzzed(120)
@given(st.one_of(changed(HF), changed(MOE), VALUES.map(lambda value: {"architectures": value})))
@example({**HF, "num_hidden_layers": 2**60})
@example({**MOE, "num_hidden_layers": 10**5, "num_experts": 10**5})
@example({**HF, "hidden_size": "8"})
@example({**HF, "num_attention_heads": 0})
@example({**HF, "rope_parameters": {"rope_theta": float("nan")}})
@example({**HF, "architectures": [["x"]]})
def test_config_of_hugging_face(folders: dict[str, Path], content: dict[str, Any]) -> None:
    """The sizes come from it alone, once our own config is not beside it."""
    run("hf, config.json values", hf_config.from_json, content, "config.json", refusals=(UsageError,))
    folder = folders["hf"]
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    with replaced(folder / "config.json", text), replaced(folder / "hyperp_config.yaml", "gone"):
        run("hf, config.json", read, "hf", folder, refusals=(UsageError,))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "hyperp.json", "config.json"])
@fuzzed(40, slowness=3)
@given(data=st.data())
def test_json_files(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    path = folders["hf"] / name
    with replaced(path, data.draw(json_files(json.loads(path.read_bytes())))):
        run(f"hf, {name} bytes", read, "hf", folders["hf"], refusals=(UsageError,))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".", "a/b", "a\0b", "x" * 3000, "", 5, None, ["x"], "model"]
)
def test_names_of_shards(folders: dict[str, Path], name: object) -> None:
    path = folders["hf"] / "model.safetensors.index.json"
    content = json.loads(path.read_bytes())
    content["weight_map"]["model.norm.weight"] = name
    with replaced(path, json.dumps(content).encode()), pytest.raises(UsageError):
        read("hf", folders["hf"])


ARGUMENTS = vars(megatron_arguments.to_arguments(inputs.model_config(**inputs.TINY), Layout(), torch.float32))
PLAIN = {name: value for name, value in ARGUMENTS.items() if not isinstance(value, torch.dtype)}


@fuzzed(120)
@given(changed(PLAIN))
@example({**PLAIN, "num_layers": float("nan")})
@example({**PLAIN, "num_attention_heads": 0, "kv_channels": None})
@example({**PLAIN, "num_layers": 2**60})
def test_arguments_of_megatron(folders: dict[str, Path], content: dict[str, Any]) -> None:
    run("megatron-lm, arguments", megatron_arguments.from_arguments, content, "it", refusals=(UsageError,))


@fuzzed(10, slowness=20)
@given(st.one_of(changed({"args": PLAIN, "iteration": 3}), VALUES))
@example([1])
@example({"args": 1})
def test_common_state(folders: dict[str, Path], content: Any) -> None:
    for kind, common in (
        ("hyperp", {"progress": content}),
        ("hyperp", {"radii": content}),
        ("hyperp", content),
        ("megatron-lm", content),
        ("megatron-lm", {"args": _namespace(content), "iteration": 0}),
    ):
        path = folders[kind] / "common.pt"
        before = path.read_bytes()
        torch.save(common, path)
        try:
            run(f"{kind}, common state", read, kind, folders[kind], refusals=(UsageError,))
            if kind == "hyperp":
                run("checkpoint, common state", inputs.read_checkpoint, folders[kind], refusals=(UsageError,))
        finally:
            path.write_bytes(before)


def _namespace(content: Any) -> argparse.Namespace:
    given = content.get("args") if isinstance(content, dict) else None
    named = {str(name): value for name, value in given.items()} if isinstance(given, dict) else {}
    return argparse.Namespace(**named)


@fuzzed(15, slowness=100)
@given(data=st.data())
def test_nothing_is_left_of_a_conversion(folders: dict[str, Path], tmp_path_factory: Any, data: st.DataObject) -> None:
    """From a folder that is damaged: a whole output, or none."""
    folder, output = folders["hf"], tmp_path_factory.mktemp("out") / "ours"
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    job = Job(
        source="hf",
        target="hyperp",
        input=str(folder),
        output=str(output),
        layout=Layout(),
        dtype=None,
        shard_bytes=None,
        tokenizer=None,
        radius=data.draw(st.sampled_from(["stateless", "from-weights"])),
        average=None,
        weights_only=False,
        verify=False,
    )
    with replaced(path, data.draw(st.one_of(damaged(path.read_bytes()), st.sampled_from(MISHAPS)))):
        run("conversion", lambda: convert(job, say=lambda _: None), refusals=(UsageError,))
    left = sorted(path.name for path in output.parent.iterdir())
    assert left in ([], ["ours"])
    if left:
        inputs.read_source("hyperp", output)
