"""Hugging Face checkpoints: safetensors with their config, tokenizer and generation config, out and in.

Stock classes know neither the factor on residual branches nor our attention scale. They are folded into weights:
the first into the projections that end a branch, the second into the gain of the norm on queries (or into the queries'
projection, without that norm). What undoes this to the bit lies beside the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_hyperp import arguments
from megatron_hyperp.config import Config
from megatron_hyperp.convert import hf_config, hf_tokenizer
from megatron_hyperp.convert.folding import fold_, unfold_
from megatron_hyperp.convert.hf_config import CODE_FILE, OURS
from megatron_hyperp.convert.mapping import NameMap, Part, Piece, Rules, multipliers
from megatron_hyperp.convert.source import Extras, Source, check_config, check_dtype, check_shape
from megatron_hyperp.convert.state import CONFIG, PADDING, UNDO, check_undo, read_mapping, read_state, write_state
from megatron_hyperp.convert.tensor_files import Spec, TensorReader, TensorWriter
from megatron_hyperp.convert.vocabulary import VOCABULARY_WEIGHTS, ResizedSource, export_rows, resized, unknown_ids
from megatron_hyperp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hyperp.data.tokenizer_files import SENTENCEPIECE, TOKENIZER_JSON
from megatron_hyperp.errors import UsageError

_MODEL, _LAYER = "model.layers.{}", "decoder.layers.{}"


def _mlp(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        f"{ours}.linear_fc1.weight": (Part(f"{theirs}.gate_proj.weight"), Part(f"{theirs}.up_proj.weight")),
        f"{ours}.linear_fc2.weight": (Part(f"{theirs}.down_proj.weight", "residual"),),
    }


def rules(config: Config) -> Rules:
    """Where transformers keeps the parameters of a model, and what is folded into which."""
    attention, theirs = f"{_LAYER}.self_attention", f"{_MODEL}.self_attn"
    # The scale of attention goes into the gain on queries, if there is one.
    query = "" if config.model.qk_layernorm else "attention"
    return {
        "embedding.word_embeddings.weight": (Part("model.embed_tokens.weight"),),
        f"{_LAYER}.input_layernorm.weight": (Part(f"{_MODEL}.input_layernorm.weight"),),
        f"{attention}.linear_qkv.weight": (
            Part(f"{theirs}.q_proj.weight", query),
            Part(f"{theirs}.k_proj.weight"),
            Part(f"{theirs}.v_proj.weight"),
        ),
        f"{attention}.linear_proj.weight": (Part(f"{theirs}.o_proj.weight", "residual"),),
        f"{attention}.q_layernorm.weight": (Part(f"{theirs}.q_norm.weight", "attention"),),
        f"{attention}.k_layernorm.weight": (Part(f"{theirs}.k_norm.weight"),),
        f"{_LAYER}.pre_mlp_layernorm.weight": (Part(f"{_MODEL}.post_attention_layernorm.weight"),),
        **_mlp(f"{_LAYER}.mlp", f"{_MODEL}.mlp"),
        f"{_LAYER}.mlp.router.weight": (Part(f"{_MODEL}.mlp.gate.weight"),),
        **_mlp(f"{_LAYER}.mlp.experts.local_experts.{{}}", f"{_MODEL}.mlp.experts.{{}}"),
        **_mlp(f"{_LAYER}.mlp.shared_experts", f"{_MODEL}.mlp.shared_expert"),
        "decoder.final_layernorm.weight": (Part("model.norm.weight", "logits"),),
        "output_layer.weight": (Part("lm_head.weight"),),
    }


def name_map(config: Config) -> NameMap:
    """The map of a model; our own class has the multipliers in its config, so that nothing is folded."""
    stock = hf_config.architecture(config) != OURS
    return NameMap(rules(config), config, multipliers(config) if stock else {})


class HuggingFaceSource(Source):
    """A folder with ``config.json`` and safetensors: Qwen3, Llama, or one that was exported from here.

    Args:
        path: the folder.

    Raises:
        UsageError: another architecture or setting, or files that are missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        content = read_mapping(self.folder / "config.json")
        foreign = hf_config.from_json(content, str(self.folder / "config.json"))
        ours = (self.folder / CONFIG).is_file()
        self.config = arguments.load_stored(self.folder / CONFIG) if ours else foreign
        state = read_state(self.folder)
        tokenizers = [self.folder / name for name in (TOKENIZER_JSON, SENTENCEPIECE)]
        found = next((str(path.resolve()) for path in tokenizers if path.is_file()), None)
        if not ours:
            self.config.data.tokenizer_model = found
            self.config.data.prepend_bos = found is not None and _adds_bos(found)
        self.extras = Extras(state.get("progress", {}), state.get("radii"), found, foreign=not ours)
        self._files = TensorReader(self.folder)
        self._undo = TensorReader(self.folder, UNDO) if (self.folder / f"{UNDO}.safetensors").is_file() else None
        check_config(self.config, str(self.folder))
        self._rows = min(foreign.model.vocab_size, self.config.model.vocab_size)
        cut = self._rows < self.config.model.vocab_size
        self._padding = TensorReader(self.folder, PADDING) if cut else None
        self._map = name_map(self.config)
        self._check()

    def _check(self) -> None:
        known = set()
        for name in self.parameters:
            for piece in self._pieces(name):
                spec = self._files.spec(piece.name)
                check_shape(str(self.folder), piece.name, spec.shape, piece.shape)
                check_dtype(str(self.folder), piece.name, spec.dtype)
                check_undo(self._undo, piece.name, piece.shape)
                known.add(piece.name)
            if self._padding is not None and name in VOCABULARY_WEIGHTS:
                rows, width = self.parameters[name].shape
                spec = self._padding.spec(name)
                check_shape(str(self.folder), f"the padding of {name}", spec.shape, (rows - self._rows, width))
                check_dtype(str(self.folder), f"the padding of {name}", spec.dtype)
        # Tied, some files hold the output layer too.
        if not self.config.model.untie_embeddings_and_output_weights:
            known.add("lm_head.weight")
        unknown = sorted(name for name in self._files.names - known if not name.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise UsageError(
                f"{self.folder} has {unknown[0]}"
                + (f" and {len(unknown) - 1} other tensors" if unknown[1:] else "")
                + " that a model here has not; it cannot be imported"
            )

    def _pieces(self, name: str) -> list[Piece]:
        shape = self.parameters[name].shape
        return self._map.pieces(name, (self._rows, *shape[1:]) if name in VOCABULARY_WEIGHTS else shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored."""
        return self._files.spec(self._pieces(name)[0].name).dtype

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter, multipliers taken out of it again, and with the padding that was cut."""
        parts = []
        for piece in self._pieces(name):
            part = self._files.read(piece.name)
            corrected = self._undo is not None and piece.name in self._undo
            unfold_(part, piece.factor, self._undo.read(piece.name) if self._undo and corrected else None)
            parts.append(part)
        tensor = self._map.merge(parts)
        if self._padding is not None and name in VOCABULARY_WEIGHTS:
            tensor = torch.cat([tensor, self._padding.read(name).to(tensor.dtype)])
        return tensor


def _adds_bos(tokenizer: str) -> bool:
    """Return whether the tokenizer of an imported model begins every text, and so began those of its training."""
    try:
        return load_tokenizer(tokenizer).adds_bos
    except UsageError:
        # It cannot go with an export either, where the same error is reported.
        return False


def write(
    folder: Path,
    source: Source,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    tokenizer: str | None,
    advance: Callable[[int], None],
    keep_padding: bool = False,
) -> None:
    """Write a folder that ``from_pretrained`` reads.

    Args:
        folder: that is there.
        source: to read from.
        dtype: of the weights; None for the source's. In another dtype than the source's, folding is not undone exactly.
        shard_bytes: of a file.
        tokenizer: as in :func:`megatron_hyperp.data.tokenizer.load_tokenizer`; None for none.
        advance: told the bytes of each parameter.
        keep_padding: write the rows of the vocabulary that are padding too; otherwise they go into a file next to the
            weights, for the way back.

    Raises:
        UsageError: the tokenizer knows more tokens than the model, or cannot be exported.
    """
    config = source.config
    known = hf_tokenizer.write(
        folder, tokenizer, max_length=config.model.positions, prepend_bos=config.data.prepend_bos
    )
    rows = export_rows(config, known, keep_padding=keep_padding)
    cut = ResizedSource(source, rows)
    _write_texts(folder, source, cut.config, dtype or source.dtype("embedding.word_embeddings.weight"), known)
    names = name_map(config)
    pieces = {name: names.pieces(name, shape.shape) for name, shape in cut.parameters.items()}
    dtypes = {name: dtype or source.dtype(name) for name in pieces}
    specs = [Spec(piece.name, piece.shape, dtypes[name]) for name in pieces for piece in pieces[name]]
    corrected = [
        Spec(piece.name, piece.shape, torch.int8)
        for name in pieces
        for piece in pieces[name]
        if dtypes[name] == source.dtype(name) and piece.factor != 1.0
    ]
    undone = {spec.name for spec in corrected}
    padding = [
        Spec(name, (source.parameters[name].shape[0] - rows, *shape.shape[1:]), dtypes[name])
        for name, shape in cut.parameters.items()
        if name in VOCABULARY_WEIGHTS and rows < config.model.vocab_size
    ]
    with (
        TensorWriter(folder, specs, shard_bytes=shard_bytes) as weights,
        TensorWriter(folder, corrected, stem=UNDO) as undo,
        TensorWriter(folder, padding, stem=PADDING) as beyond,
    ):
        for name, places in pieces.items():
            tensor = source.read(name)
            advance(tensor.nbytes)
            if padding and name in VOCABULARY_WEIGHTS:
                beyond.write(name, tensor[rows:].to(dtypes[name]))
                tensor = resized(tensor, rows)
            for piece, part in zip(places, names.split(tensor, len(places)), strict=True):
                out = part.contiguous()
                corrections = fold_(out, piece.factor, undo=piece.name in undone, name=piece.name)
                weights.write(piece.name, out.to(dtypes[name]))
                if corrections is not None:
                    undo.write(piece.name, corrections)


def _write_texts(folder: Path, source: Source, cut: Config, dtype: torch.dtype, tokenizer: Tokenizer | None) -> None:
    """Write the configs, and for our own class its code.

    Args:
        folder: that is there.
        source: of the weights; its config is written with them.
        cut: its config, with the vocabulary that is exported.
        dtype: of the weights.
        tokenizer: that goes with them.
    """
    config = source.config
    eos = tokenizer.eod if tokenizer else None
    bos = tokenizer.bos if tokenizer and config.data.prepend_bos else None
    content = hf_config.to_json(cut, dtype=str(dtype).removeprefix("torch."), bos=bos, eos=eos)
    generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "eos_token_id": eos, "pad_token_id": eos}
    if bos is not None:
        generation["bos_token_id"] = bos
    if unknown := unknown_ids(tokenizer, cut.model.vocab_size):
        generation["suppress_tokens"] = unknown
    for name, values in (("config.json", content), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    write_state(folder, source)
    if hf_config.architecture(config) == OURS:
        shutil.copyfile(Path(__file__).with_name(CODE_FILE), folder / CODE_FILE)


def load_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder's model as transformers would; no code of the folder's is run.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError("transformers is not installed; pip install megatron-hyperp[convert]") from error

    name = read_mapping(folder / "config.json")["architectures"][0]
    kind: Any
    if name == hf_config.OURS:
        from megatron_hyperp.convert.modeling_hyperp import HyperPForCausalLM as kind
    else:
        kind = getattr(transformers, name)
    transformers.utils.logging.disable_progress_bar()
    # A config may name kernels of a hub to run, and a folder may hold pickled weights: neither is asked for.
    return kind.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()
