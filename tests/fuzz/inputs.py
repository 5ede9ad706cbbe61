"""Valid inputs, small, that targets damage; and what reads them, all of it."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_hyperp import arguments, checksums
from megatron_hyperp.convert import huggingface, megatron_lm
from megatron_hyperp.convert.convert import open_source
from megatron_hyperp.convert.source import Source
from megatron_hyperp.convert.storage import CheckpointReader
from megatron_hyperp.convert.tensor_files import TensorReader
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.data import streams
from megatron_hyperp.data.corpus import Corpus
from megatron_hyperp.data.datasets import _is_whole_array
from megatron_hyperp.data.indexed import check_prefix, check_vocabulary
from megatron_hyperp.data.sources import find_sources
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.pickles import load_metadata, load_values
from megatron_hyperp.training import checkpointing
from megatron_hyperp.training.checkpoint_folders import TRACKER, candidates
from tests.random_source import RandomSource, model_config, write_random

# As small as a model can be.
TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "vocab_size": 16,
}
EXPERTS = {"num_experts": 2, "moe_router_topk": 1, "moe_ffn_hidden_size": 8}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 3, "content": "</s>", "special": True, "single_word": False, "lstrip": False}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, "unk_token": "<unk>"},
}
TOKENIZER["added_tokens"][0] |= {"rstrip": False, "normalized": False}


def idx() -> bytes:
    """Three sequences of 2, 3 and 0 uint16 tokens, in three documents."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 4)
    return header + struct.pack("<3i3q4q", 2, 3, 0, 0, 4, 10, 0, 1, 2, 3)


def read_prefix(folder: Path, content: bytes) -> None:
    """An ``.idx`` beside the ``.bin`` that the valid one goes with."""
    (folder / "x.idx").write_bytes(content)
    (folder / "x.bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    check_prefix(folder / "x").sequence_lengths().sum()
    check_vocabulary(folder / "x", 6)


def npy() -> bytes:
    """An index as Megatron caches it."""
    stream = io.BytesIO()
    np.save(stream, np.arange(6, dtype=np.int32).reshape(3, 2))
    return stream.getvalue()


def read_npy(folder: Path, content: bytes) -> None:
    """As Megatron does, if it is let: what this would run must not be let."""
    path = folder / "x.npy"
    path.write_bytes(content)
    if _is_whole_array(path):
        np.load(path, allow_pickle=False, mmap_mode="r").sum()


def read_file(name: str, reader: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    """Read a file of this name and content."""

    def read(folder: Path, content: bytes) -> Any:
        (folder / name).write_bytes(content)
        return reader(folder / name)

    return read


def read_tokenizer(path: Path) -> None:
    """Load one, and encode a text."""
    tokenizer = load_tokenizer(path)
    tokenizer.encode("a b\u2581 x")


def read_tracker(path: Path) -> None:
    """Look for the checkpoints that a tracker file names."""
    candidates(path.parent)
    megatron_lm._find(path.parent)


def read_checksums(path: Path) -> None:
    """Compare what they say."""
    checksums.first_fault(path.parent)
    checksums.faults(path.parent)


def json_lines() -> bytes:
    """A few documents."""
    return b'{"id": 1, "text": "a\\u00e9\\n"}\n{"text": "", "id": [2, {"a": null}]}\n\n{"text": "\xc3\xa9"}\n'


def read_documents(path: Path) -> None:
    """All of a corpus, bad lines left out; compressed data may not ask for as much memory as it may otherwise."""
    with mock.patch.multiple(streams, ZSTD_WINDOW=2**23, XZ_MEMORY=2**27):
        for _ in Corpus(find_sources([path]), skip_bad_lines=10):
            pass


def safetensors() -> bytes:
    """Two small tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header["a"] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header["b"] = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(32))


def read_safetensors(path: Path) -> None:
    """Every tensor."""
    reader = TensorReader(path.parent)
    for name in reader.names:
        reader.read(name)


def values() -> bytes:
    """What ``torch.save`` makes of tensors and plain values."""
    stream = io.BytesIO()
    torch.save({"iteration": 1, "a": torch.arange(6.0), "words": ["x", (1, 2.5)]}, stream)
    return stream.getvalue()


def read_checkpoint(folder: Path) -> None:
    """As a training that resumes does before it starts, then as a converter does."""
    candidates(folder)
    checksums.first_fault(folder)
    reader = CheckpointReader(folder)
    _ = reader.common
    for slab in reader.slabs():
        reader.read(slab)
    for key in reader.objects:
        reader.read_object(key)
    checkpointing.common_state(folder)


def read_source(kind: str, path: Path, config: str | None = None) -> None:
    """Every parameter of a source of converters."""
    source = open_source(kind, path, config)
    for name in source.parameters:
        source.read(name)


def write_hf(folder: Path, **overrides: Any) -> Path:
    """A tiny model as a Hugging Face folder with a tokenizer."""
    source = RandomSource(model_config(**TINY, **overrides))
    folder.mkdir()
    huggingface.write(folder, source, dtype=None, shard_bytes=2000, tokenizer=None, advance=lambda _: None)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def write_hyperp(folder: Path) -> Path:
    """A tiny model as a checkpoint of ours; return the folder of its iteration."""
    write_random(folder, **TINY)
    return folder / "iter_0000000"


def write_megatron(folder: Path) -> Path:
    """A tiny model as a checkpoint of Megatron-LM; return the folder of its iteration."""
    folder.mkdir()
    source: Source = RandomSource(model_config(**TINY))
    megatron_lm.write(folder, source, layout=Layout(), dtype=None, advance=lambda _: None)
    return folder / megatron_lm.RELEASE


def write_archscale(folder: Path) -> Path:
    """A tiny model as ArchScale's ``.pth``, beside a config; return the file."""
    from megatron_hyperp.convert.archscale import rules
    from megatron_hyperp.convert.mapping import NameMap

    folder.mkdir()
    config = model_config(**TINY)
    source, names = RandomSource(config), NameMap(rules(fused=True, sonic=False), config, {})
    tensors = {
        piece.name: source.read(name).view(piece.shape)
        for name, shape in source.parameters.items()
        for piece in names.pieces(name, shape.shape)
    }
    torch.save({"model": tensors, "step_count": 3}, folder / "x.pth")
    (folder / "config.yaml").write_text(arguments.to_yaml(config))
    return folder / "x.pth"


def metadata(folder: Path) -> Any:
    """The index of a checkpoint, as torch keeps it."""
    return pickle.loads((folder / ".metadata").read_bytes())


# Readers of one file's bytes: what is valid, how it is read, and how it may be refused.
FILES: dict[str, tuple[Callable[[], bytes], Callable[[Path, bytes], Any], tuple[type[Exception], ...]]] = {
    "idx": (idx, read_prefix, (UsageError,)),
    "npy": (npy, read_npy, ()),
    "values": (values, read_file("x.pt", load_values), (UsageError,)),
    "safetensors": (safetensors, read_file("model.safetensors", read_safetensors), (UsageError,)),
    "tokenizer": (lambda: json.dumps(TOKENIZER).encode(), read_file("tokenizer.json", read_tokenizer), (UsageError,)),
    "tracker": (lambda: b"12\n", read_file(TRACKER, read_tracker), (UsageError,)),
    "checksums": (
        lambda: json.dumps({"x": {"size": 3, "xxh3_128": "ab"}}).encode(),
        read_file(checksums.FILE, read_checksums),
        (ValueError,),
    ),
    "corpus": (json_lines, read_file("corpus", read_documents), (UsageError,)),
    "metadata": (lambda: _METADATA, read_file(".metadata", load_metadata), (UsageError,)),
}


def _small_metadata() -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])
    index = MetadataIndex("a", torch.Size([0, 0]))
    return pickle.dumps(Metadata({"a": tensor}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 100)}))


_METADATA = _small_metadata()
