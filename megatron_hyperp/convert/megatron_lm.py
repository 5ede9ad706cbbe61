"""Megatron-LM's GPT checkpoints in the torch_dist format, out and in, with the arguments in their common state.

Tensors have our names there. Stock models have none of our multipliers, and sum routed and shared experts without our
sqrt(1/2): these are folded into weights as for Hugging Face, and undone to the bit.
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/checkpointing.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import arguments
from megatron_hyperp.arguments import shown
from megatron_hyperp.config import Config
from megatron_hyperp.convert.folding import fold_, unfold_
from megatron_hyperp.convert.mapping import NameMap, Part, Rules, multipliers
from megatron_hyperp.convert.source import Extras, Source, check_config, check_dtype, check_shape, slab_of
from megatron_hyperp.convert.state import CONFIG, UNDO, check_undo, read_state, write_state
from megatron_hyperp.convert.storage import CheckpointReader, Slab
from megatron_hyperp.convert.tensor_files import Spec, TensorReader, TensorWriter
from megatron_hyperp.convert.vocabulary import VOCABULARY_WEIGHTS, padded_for_ranks, resized
from megatron_hyperp.convert.writing import Item, Layout, write_checkpoint
from megatron_hyperp.errors import UsageError
from megatron_hyperp.pickles import megatron_classes
from megatron_hyperp.resolve import fill_dense
from megatron_hyperp.training.checkpointing import TRACKER, checkpoint_folder, iteration_in, read_tracker

# Megatron-LM's name for a checkpoint of weights alone: it begins at iteration 0, and asks for no random states.
RELEASE = "release"
# Extra states, which layers of TransformerEngine ask for, are not in it.
_FLAGS = "--use-checkpoint-args --no-load-optim --no-load-rng --dist-ckpt-strictness log_all"
# Arguments, with the only value that our model can express.
_ONLY: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "rope_type": "rope",
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_mup": False,
    "apply_query_key_layer_scaling": False,
    "multi_latent_attention": False,
    "window_size": None,
    "mtp_num_layers": None,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_token_drop_policy": "probs",
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_shared_expert_gate": False,
}
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


def from_arguments(given: Mapping[str, Any], where: str) -> Config:
    """Return our config of Megatron-LM's arguments.

    Raises:
        UsageError: a setting that ours cannot express; it is named.
    """
    for name, only in _ONLY.items():
        if given.get(name, only) not in (only, None):
            raise UsageError(f"{where} has {name} {shown(given[name])}; a model here has {only}: it cannot be imported")
    config = Config()
    try:
        _fill(config, given)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where} lacks an argument that a model needs ({error}); take another copy") from error
    return config


def _fill(config: Config, given: Mapping[str, Any]) -> None:
    model, moe = config.model, config.moe

    def number(name: str, otherwise: float) -> Any:
        return otherwise if given.get(name) is None else given[name]

    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        setattr(model, name, int(given[name]))
    grouped = given.get("group_query_attention", False)
    model.num_query_groups = int(given["num_query_groups"]) if grouped else model.num_attention_heads
    model.vocab_size = int(given["padded_vocab_size"])
    model.kv_channels = int(number("kv_channels", model.hidden_size // model.num_attention_heads))
    model.seq_length = int(number("seq_length", model.seq_length))
    model.max_position_embeddings = max(int(number("max_position_embeddings", 0)), model.seq_length)
    # --norm-epsilon has been kept under the name of Megatron-Core's config since 0.16.
    model.norm_epsilon = float(number("layernorm_epsilon", number("norm_epsilon", 1e-5)))
    model.rotary_base = int(number("rotary_base", 10000))
    model.qk_layernorm = bool(given.get("qk_layernorm"))
    model.untie_embeddings_and_output_weights = bool(given.get("untie_embeddings_and_output_weights"))
    model.softmax_scale = float(number("softmax_scale", model.kv_channels**-0.5))
    model.residual_multiplier, model.logits_multiplier = 1.0, 1.0
    if given.get("num_experts"):
        moe.num_experts, moe.moe_gate = int(given["num_experts"]), "softmax"
        moe.moe_router_topk = int(number("moe_router_topk", 2))
        moe.moe_ffn_hidden_size = int(number("moe_ffn_hidden_size", model.ffn_hidden_size))
        moe.moe_shared_expert_intermediate_size = int(number("moe_shared_expert_intermediate_size", 0))
        if given.get("moe_expert_capacity_factor") is not None:
            moe.moe_expert_capacity_factor = float(given["moe_expert_capacity_factor"])
    else:
        fill_dense(moe)


def to_arguments(config: Config, layout: Layout, dtype: torch.dtype) -> argparse.Namespace:
    """Return the arguments that Megatron-LM reads back with ``--use-checkpoint-args``, and those it compares."""
    model, moe = config.model, config.moe
    given = {name: value for name, value in _ONLY.items() if value is not None}
    given |= {
        **{name: getattr(model, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")},
        **{name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "seq_length")},
        **{name: getattr(model, name) for name in ("qk_layernorm", "norm_epsilon", "rotary_base")},
        "layernorm_epsilon": model.norm_epsilon,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "group_query_attention": True,
        "max_position_embeddings": model.positions,
        "padded_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "tokenizer_type": None,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": moe.num_experts or None,
        "moe_router_topk": moe.moe_router_topk or 2,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size or None,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or None,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_random_init": False,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
    }
    return argparse.Namespace(**given)


def flags(config: Config) -> str:
    """Return the flags with which Megatron-LM loads an export: those that it does not take from the checkpoint as well.

    Args:
        config: of the export.
    """
    model, moe = config.model, config.moe
    found = [_FLAGS]
    if model.qk_layernorm:
        found.append("--qk-layernorm")
    if model.norm_epsilon != 1e-5:
        found.append(f"--norm-epsilon {model.norm_epsilon}")
    if moe.num_experts:
        found.append("--moe-router-dtype fp32")
        if moe.moe_expert_capacity_factor is not None:
            found.append(f"--moe-expert-capacity-factor {moe.moe_expert_capacity_factor}")
    return " ".join(found)


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
