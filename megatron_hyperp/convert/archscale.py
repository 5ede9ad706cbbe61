"""ArchScale's checkpoints (github.com/microsoft/ArchScale), read: the ``.pth`` that Lightning Fabric writes.

It keeps no config of the model, so that ours is given beside it; shapes are compared. QKV is fused per key-value group
as here, or in three; gate rows come before up rows, but alternate in the experts of SonicMoE.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config, ParallelConfig
from megatron_hyperp.convert.folding import unfold_
from megatron_hyperp.convert.mapping import NameMap, Part, Rules
from megatron_hyperp.convert.source import Extras, Source, check_config, check_dtype, check_shape
from megatron_hyperp.errors import UsageError
from megatron_hyperp.pickles import load_values

_OURS, _THEIRS = "decoder.layers.{}", "transformer.h.{}"
# Norms without gains; LayerNormFunc, another such class, is no RMSNorm.
_GAINLESS = "RMSNormFunc"


def rules(*, fused: bool, sonic: bool) -> Rules:
    """Where ArchScale keeps the parameters of a model.

    Args:
        fused: whether QKV is one weight.
        sonic: whether experts are SonicMoE's, all of a layer in one tensor.
    """
    attention, experts = f"{_THEIRS}.attn", f"{_THEIRS}.mlp"
    names = ("attn",) if fused else ("q_proj", "k_proj", "v_proj")
    # A number that is left over by the pattern is that of the expert.
    number = "" if sonic else "{}"
    return {
        "embedding.word_embeddings.weight": (Part("transformer.wte.weight"),),
        f"{_OURS}.input_layernorm.weight": (Part(f"{_THEIRS}.norm_1.weight"),),
        f"{_OURS}.self_attention.linear_qkv.weight": tuple(Part(f"{attention}.{name}.weight") for name in names),
        f"{_OURS}.self_attention.linear_proj.weight": (Part(f"{attention}.proj.weight"),),
        f"{_OURS}.self_attention.q_layernorm.weight": (Part(f"{attention}.q_norm.weight"),),
        f"{_OURS}.self_attention.k_layernorm.weight": (Part(f"{attention}.k_norm.weight"),),
        f"{_OURS}.pre_mlp_layernorm.weight": (Part(f"{_THEIRS}.norm_2.weight"),),
        f"{_OURS}.mlp.linear_fc1.weight": (Part(f"{_THEIRS}.mlp.w1.weight"),),
        f"{_OURS}.mlp.linear_fc2.weight": (Part(f"{_THEIRS}.mlp.w3.weight"),),
        f"{_OURS}.mlp.router.weight": (Part(f"{experts}.router{'' if sonic else '.lc_proj'}.weight"),),
        f"{_OURS}.mlp.experts.local_experts.{{}}.linear_fc1.weight": (Part(f"{experts}.mods_in.weight{number}"),),
        f"{_OURS}.mlp.experts.local_experts.{{}}.linear_fc2.weight": (
            Part(f"{experts}.mods_out.weight{number}", "experts"),
        ),
        f"{_OURS}.mlp.shared_experts.linear_fc1.weight": (Part(f"{experts}.shared_mod_in.weight"),),
        f"{_OURS}.mlp.shared_experts.linear_fc2.weight": (Part(f"{experts}.shared_mod_out.weight", "experts"),),
        "decoder.final_layernorm.weight": (Part("transformer.ln_f.weight"),),
        "output_layer.weight": (Part("lm_head.weight"),),
    }


class ArchScaleSource(Source):
    """A ``.pth`` file of ArchScale.

    Args:
        path: of the file.
        config: YAML of the model, as the trainer takes it; None is refused.

    Raises:
        UsageError: code objects, damage, no config, or tensors that a model of it has not.
    """

    def __init__(self, path: str | Path, config: str | None) -> None:
        if config is None:
            raise UsageError(
                "--from archscale needs --config, our YAML of the same model (examples/configs has the paper's):"
                " ArchScale's file has none"
            )
        self.path = Path(path)
        # Tensors stay in the file until they are read.
        content = load_values(self.path, mmap=True)
        self._tensors = _tensors(content, self.path)
        hparams = content.get("hparams") if isinstance(content.get("hparams"), dict) else {}
        self._gainless = hparams.get("norm_class") == _GAINLESS
        self.config = _resolved(config, self._tensors)
        check_config(self.config, config)
        steps = content.get("step_count")
        self.extras = Extras(
            progress={"iteration": steps if type(steps) is int else 0}, tokenizer=self.config.data.tokenizer_model
        )
        self._sonic = any(name.endswith("mlp.mods_in.weight") for name in self._tensors)
        self._fused = any(name.endswith("attn.attn.weight") for name in self._tensors)
        moe = self.config.moe
        # Its softmax gates come with a plain sum of routed and shared experts, where ours is times sqrt(1/2).
        summed = moe.moe_gate == "softmax" and moe.moe_shared_expert_intermediate_size
        factors = {"experts": math.sqrt(0.5)} if summed else {}
        self._map = NameMap(rules(fused=self._fused, sonic=self._sonic), self.config, factors)
        self._check()

    def _check(self) -> None:
        known = {"lm_head.weight"} if not self.config.model.untie_embeddings_and_output_weights else set()
        for name in self.parameters:
            for piece, shape in self._pieces(name):
                known.add(piece)
                if piece not in self._tensors and not self._is_gain_of_one(name):
                    raise UsageError(f"{self.path} lacks {piece}, which the model of --config has; give another config")
                if piece in self._tensors:
                    check_shape(str(self.path), piece, tuple(self._tensors[piece].shape), shape)
                    check_dtype(str(self.path), piece, self._tensors[piece].dtype)
        unknown = sorted(set(self._tensors) - known)
        if unknown:
            raise UsageError(f"{self.path} has {unknown[0]}, which a model of --config has not; it cannot be imported")

    def _is_gain_of_one(self, name: str) -> bool:
        return self._gainless and name.endswith("layernorm.weight") and ".self_attention." not in name

    def _is_expert(self, name: str) -> bool:
        return self._sonic and ".local_experts." in name

    def _pieces(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes there; experts of SonicMoE are one tensor."""
        stacked = (self.config.moe.num_experts,) if self._is_expert(name) else ()
        pieces = self._map.pieces(name, self.parameters[name].shape)
        return [(piece.name, (*stacked, *piece.shape)) for piece in pieces]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""
        names = [piece for piece, _ in self._pieces(name) if piece in self._tensors]
        return self._tensors[names[0] if names else "transformer.wte.weight"].dtype

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter."""
        if self._is_gain_of_one(name) and self._pieces(name)[0][0] not in self._tensors:
            return torch.ones(self.parameters[name].shape, dtype=self.dtype(name))
        parts = [self._tensors[piece] for piece, _ in self._pieces(name)]
        if self._is_expert(name):
            expert = parts[0][int(name.split(".local_experts.")[1].split(".")[0])]
            # Gate rows are the even ones.
            parts = [torch.cat([expert[0::2], expert[1::2]]) if name.endswith("linear_fc1.weight") else expert]
        parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        for part, piece in zip(parts, self._map.pieces(name, self.parameters[name].shape), strict=True):
            unfold_(part, piece.factor)
        return self._map.merge(parts)


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors by name, what compilation puts before names taken off."""
    state = content.get("model", content) if isinstance(content, Mapping) else None
    found = {
        str(name).replace("_orig_mod.", ""): value
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(value, torch.Tensor)
    }
    if "transformer.wte.weight" not in found:
        raise UsageError(f"{path} has no model of ArchScale in it (no transformer.wte.weight); give its .pth file")
    return found


def _resolved(path: str, tensors: Mapping[str, torch.Tensor]) -> Config:
    """Complete the config on one rank, the size of the vocabulary being that of the file."""
    config = copy.deepcopy(arguments.load_yaml(path))
    config.parallel = ParallelConfig()
    if not config.model.vocab_size:
        config.model.vocab_size = tensors["transformer.wte.weight"].shape[0]
    return config.resolve()
