"""Megatron-LM's GPT checkpoints in the torch_dist format, out and in, with the arguments in their common state.

Tensors have our names there. Stock models have none of our multipliers, and sum routed and shared experts without our
sqrt(1/2): these are folded into weights as for Hugging Face, and undone to the bit.
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/checkpointing.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.convert.folding import fold_, unfold_
from megatron_hyperp.convert.mapping import NameMap, Part, Rules, multipliers
from megatron_hyperp.convert.megatron_arguments import from_arguments, to_arguments
from megatron_hyperp.convert.slabs import Slab
from megatron_hyperp.convert.source import Extras, Source, check_config, check_dtype, check_shape, slab_of
from megatron_hyperp.convert.state import CONFIG, UNDO, check_undo, read_state, write_state
from megatron_hyperp.convert.storage import CheckpointReader
from megatron_hyperp.convert.tensor_files import Spec, TensorReader, TensorWriter
from megatron_hyperp.convert.vocabulary import VOCABULARY_WEIGHTS, padded_for_ranks, resized
from megatron_hyperp.convert.writing import Item, Layout, write_checkpoint
from megatron_hyperp.errors import UsageError
from megatron_hyperp.pickles import megatron_classes
from megatron_hyperp.training.checkpoint_folders import TRACKER, checkpoint_folder, iteration_in, read_tracker

# Megatron-LM's name for a checkpoint of weights alone: it begins at iteration 0, and asks for no random states.
RELEASE = "release"
# How names of the model's own weights begin; the optimizer's have a prefix.
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")
_ATTENTION, _MLP = "decoder.layers.{}.self_attention", "decoder.layers.{}.mlp"


def rules(config: Config) -> Rules:
    """What is folded into which parameter; names are ours. A fused QKV weight is three parts, for its queries' sake."""
    query = "" if config.model.qk_layernorm else "attention"
    factors = {
        f"{_ATTENTION}.linear_proj.weight": "residual",
        f"{_ATTENTION}.q_layernorm.weight": "attention",
        f"{_MLP}.linear_fc2.weight": "residual",
        f"{_MLP}.experts.local_experts.{{}}.linear_fc2.weight": "experts",
        f"{_MLP}.shared_experts.linear_fc2.weight": "experts",
        "decoder.final_layernorm.weight": "logits",
    }
    qkv = f"{_ATTENTION}.linear_qkv.weight"
    return {
        **{name: (Part(name, factor),) for name, factor in factors.items()},
        qkv: (Part(f"{qkv}[q]", query), Part(f"{qkv}[k]"), Part(f"{qkv}[v]")),
    }


class _Folding:
    """What of a model is folded, parameter by parameter."""

    def __init__(self, config: Config) -> None:
        factors = multipliers(config)
        mix = math.sqrt(0.5) if config.moe.moe_shared_expert_intermediate_size else 1.0
        self._rules = rules(config)
        self._map = NameMap(self._rules, config, factors | {"experts": factors["residual"] * mix})

    def parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], float]]:
        """Return name, shape and factor of the parts of a parameter; none if nothing is folded into it."""
        if not self._map.knows(name):
            return []
        pieces = [(piece.name, piece.shape, piece.factor) for piece in self._map.pieces(name, shape)]
        return pieces if any(factor != 1.0 for _, _, factor in pieces) else []

    def split(self, tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """Cut a parameter into contiguous parts."""
        return [part.contiguous() for part in self._map.split(tensor, parts)]

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Undo :meth:`split`."""
        return self._map.merge(parts)


def megatron_slabs(name: str, config: Config) -> list[Slab]:
    """Return where Megatron-LM keeps a parameter.

    Its layers of TransformerEngine give the norm before experts, which no product is fused with, a name of its own;
    its local ones that of a dense model. Both are written, and either is read.
    """
    slab = slab_of(name)
    if config.moe.num_experts and name.endswith("pre_mlp_layernorm.weight"):
        return [Slab("decoder.layers.pre_mlp_layernorm.weight", slab.at), slab]
    return [slab]


class MegatronSource(Source):
    """A GPT checkpoint of Megatron-LM, in the torch_dist format.

    Args:
        path: folder of one iteration, or the one above it, whose tracker file names it.

    Raises:
        UsageError: another format or model, code objects, or what is there is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        folder = _find(Path(path))
        self.folder = folder
        self.reader = CheckpointReader(folder, allowed=tuple(megatron_classes()))
        common = self.reader.common
        given = common.get("args")
        if not isinstance(given, argparse.Namespace):
            raise UsageError(
                f"{folder} has no arguments of Megatron-LM in its common state; is it one of its checkpoints?"
            )
        state = read_state(folder)
        self.config = arguments.load_stored(folder / CONFIG) if state else from_arguments(vars(given), str(folder))
        check_config(self.config, str(folder))
        iteration = common.get("iteration", 0)
        self.extras = Extras(
            progress=state.get("progress") or {"iteration": iteration if type(iteration) is int else 0},
            radii=state.get("radii"),
            tokenizer=self.config.data.tokenizer_model,
            foreign=not state,
        )
        self._check_all_known()
        self._undo = TensorReader(folder, UNDO) if (folder / f"{UNDO}.safetensors").is_file() else None
        self._folding = _Folding(self.config)
        for name, shape in self.parameters.items():
            found, expected = self.reader.shape(self._slab(name)), shape.shape
            # An export from here may be padded for its layout.
            if state and name in VOCABULARY_WEIGHTS and found[:1] > expected[:1]:
                expected = (found[0], *expected[1:])
            check_shape(str(folder), name, found, expected)
            check_dtype(str(folder), name, self.dtype(name))
            for piece, part, _ in self._folding.parts(name, shape.shape):
                check_undo(self._undo, piece, part)

    def _check_all_known(self) -> None:
        """Refuse weights that a model here does not have: without them it would compute something else."""
        known = {slab.key for name in self.parameters for slab in megatron_slabs(name, self.config)}
        for key in sorted(self.reader.tensors):
            if key.startswith(_OF_THE_MODEL) and not key.endswith("_extra_state") and key not in known:
                raise UsageError(f"{self.folder} has {key}, which no model here has: it cannot be imported")

    def _slab(self, name: str) -> Slab:
        slabs = megatron_slabs(name, self.config)
        return next((slab for slab in slabs if slab.key in self.reader.tensors), slabs[0])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""
        return self.reader.dtype(self._slab(name))

    def read_folded(self, name: str) -> torch.Tensor:
        """Read a parameter as it stands there, less the padding that an export from here added."""
        tensor = self.reader.read(self._slab(name))
        return resized(tensor, self.config.model.vocab_size) if name in VOCABULARY_WEIGHTS else tensor

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter, multipliers taken out of it again."""
        tensor = self.read_folded(name)
        places = self._folding.parts(name, tuple(tensor.shape))
        if not places:
            return tensor
        parts = self._folding.split(tensor, len(places))
        for part, (piece, _, factor) in zip(parts, places, strict=True):
            known = self._undo is not None and piece in self._undo
            unfold_(part, factor, self._undo.read(piece) if self._undo and known else None)
        return self._folding.merge(parts)


def _find(path: Path) -> Path:
    """Return the folder of the iteration that a tracker file names, or the path itself."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    word = read_tracker(tracker)
    iteration = iteration_in(word)
    folder = path / RELEASE if word == RELEASE else None if iteration is None else checkpoint_folder(path, iteration)
    if folder is None or not folder.is_dir():
        raise UsageError(f"{tracker} names {word[:20]!r}, which is not there; name the folder of one iteration")
    return folder


def check(config: Config) -> None:
    """Refuse a model that Megatron-LM's GPT cannot express.

    Raises:
        UsageError: SqrtGate, or one expert a token.
    """
    moe = config.moe
    if not moe.num_experts:
        return
    for what, given in (("--moe-gate sqrt", moe.moe_gate == "sqrt"), ("one expert a token", moe.moe_router_topk == 1)):
        if given:
            raise UsageError(f"{what} is nothing that a GPT of Megatron-LM has; give --to hf, whose export has it")


def write(
    root: Path, source: Source, *, layout: Layout, dtype: torch.dtype | None, advance: Callable[[int], None]
) -> None:
    """Write a folder that Megatron-LM's ``--load`` takes, its vocabulary padded if the layout's ranks cannot share it.

    Arguments as of :func:`hyperp.write_weights`.
    """
    original, source = source, padded_for_ranks(source, layout.tp)
    config = source.config
    folding, folder = _Folding(config), root / RELEASE
    folder.mkdir()
    parts = {name: folding.parts(name, shape.shape) for name, shape in source.parameters.items()}
    corrected = [
        Spec(piece, shape, torch.int8)
        for name, places in parts.items()
        for piece, shape, factor in places
        if factor != 1.0 and dtype in (None, source.dtype(name))
    ]
    undone = {spec.name for spec in corrected}
    with TensorWriter(folder, corrected, stem=UNDO) as undo:

        def reading(name: str) -> Callable[[], torch.Tensor]:
            def read() -> torch.Tensor:
                tensor = source.read(name)
                if parts[name]:
                    cut = folding.split(tensor, len(parts[name]))
                    for part, (piece, _, factor) in zip(cut, parts[name], strict=True):
                        corrections = fold_(part, factor, undo=piece in undone, name=piece)
                        if corrections is not None:
                            undo.write(piece, corrections)
                    tensor = folding.merge(cut)
                return tensor if dtype is None else tensor.to(dtype)

            return read

        items = [
            Item(slab, shape.shape, dtype or source.dtype(name), reading(name))
            for name, shape in source.parameters.items()
            for slab in megatron_slabs(name, config)
        ]
        weights_dtype = dtype or source.dtype("embedding.word_embeddings.weight")
        common = {
            "args": to_arguments(config, layout, weights_dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
        }
        write_checkpoint(folder, items, common, layout=layout, advance=advance)
    write_state(folder, original)
    (root / TRACKER).write_text(RELEASE)
