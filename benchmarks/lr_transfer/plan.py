"""What is trained: for each method, one base model, and models that differ from it in width, depth, tokens or top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

AXES = ("width", "depth", "tokens", "K")
# That of the initial standard deviation 0.02 at width 512.
LOGIT = 10.24


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        name: its label.
        optimizer: ``--optimizer``.
        axes: of :data:`AXES`, along which it is measured.
        fixed: further settings.
        logit: largest logit that the output layer's sphere allows before the last norm's gain grows; None: as it comes.
    """

    name: str
    optimizer: str
    axes: tuple[str, ...] = AXES
    fixed: dict[str, Any] = field(default_factory=dict)
    logit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Sizes for a machine; the base model has the middle width, the least depth and the middle tokens.

    Attributes:
        widths: hidden sizes.
        depths: layers.
        tokens: training tokens.
        topk: K of the mixtures of experts, at the base's width, depth and tokens.
        sparsity: S of them.
        head_size: of all models.
        seq_length: tokens of a sequence.
        batch: sequences of a step.
        eval_iters: batches of the held-out loss, the same ones for all.
        starts: base learning rate from which the search starts, by method, or else by optimizer.
        held: learning rate of embedding and Adam-type tensors where they are held fixed.
        limit: most learning rates of a search.
        corpus: size of the text.
        methods: names, those that matter most first.
        seeds: of weights and of the order of the text.
        workers: trainings at a time.
        bf16: as ``--bf16``.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    tokens: tuple[int, ...]
    topk: tuple[int, ...]
    sparsity: int = 4
    head_size: int
    seq_length: int
    batch: int
    eval_iters: int
    starts: dict[str, float]
    held: float
    limit: int = 10
    corpus: str = "20MB"
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (1234,)
    workers: int
    bf16: bool = False

    @property
    def base(self) -> dict[str, int]:
        """Value of each axis at the base model; that of K is the least, of the models with experts."""
        return {
            "width": self.widths[len(self.widths) // 2],
            "depth": self.depths[0],
            "tokens": self.tokens[len(self.tokens) // 2],
            "K": self.topk[0],
        }

    def values(self, axis: str) -> tuple[int, ...]:
        """The values of an axis."""
        return {"width": self.widths, "depth": self.depths, "tokens": self.tokens, "K": self.topk}[axis]


def methods(preset: Preset) -> dict[str, Method]:
    """The methods by name; the three last separate causes.

    * ``hyperp-held`` holds the learning rate of embedding, gains and output layer where the matrices' varies: which of
      them moves the optimum?
    * ``hyperp-logits`` gives the output layer a sphere that allows logits of :data:`LOGIT` at any width. On the sphere
      its rows have a norm of 0.02 sqrt(w), in the mean square, and their input has sqrt(w) times the last norm's gain:
      while that is 1 a logit reaches 0.02 w, 20 at the paper's least width, 1024, but 1.3 at width 64.
    * ``hyperp-softmax`` has plain gates: does SqrtGate hold the optimum over K?
    """
    held = {"embedding_lr": preset.held, "adam_lr": preset.held}
    every = [Method(name, name) for name in ("hyperp", "muonh", "muon", "adamw")]
    every.append(Method("hyperp-held", "hyperp", ("width", "depth", "tokens"), held))
    every.append(Method("hyperp-logits", "hyperp", ("width", "depth", "tokens"), logit=LOGIT))
    every.append(Method("hyperp-softmax", "hyperp", ("K",), {"moe_gate": "softmax"}))
    return {method.name: method for method in every}


PRESETS = {
    "cpu": Preset(
        widths=(32, 64, 128),
        depths=(2, 4, 8),
        tokens=(2**17, 2**19, 2**21),
        topk=(2, 4, 8),
        head_size=16,
        seq_length=128,
        batch=16,
        eval_iters=32,
        starts={"hyperp": 0.085, "muonh": 0.085, "muon": 0.03, "adamw": 0.0113, "hyperp-logits": 0.0425},
        held=0.085,
        methods=("hyperp", "hyperp-held", "hyperp-logits", "adamw", "muonh", "muon", "hyperp-softmax"),
        workers=2,
    ),
    "h200": Preset(
        widths=(128, 256, 512),
        depths=(2, 4, 8),
        tokens=(2**20, 2**22, 2**24),
        topk=(2, 4, 8),
        head_size=64,
        seq_length=256,
        batch=64,
        eval_iters=16,
        starts={"hyperp": 0.06, "muonh": 0.06, "muon": 0.02, "adamw": 0.004},
        held=0.06,
        corpus="100MB",
        methods=("hyperp", "hyperp-held", "hyperp-logits", "adamw", "muonh", "muon"),
        workers=8,
        bf16=True,
    ),
    "tiny": Preset(
        widths=(32,),
        depths=(1,),
        tokens=(2048,),
        topk=(2,),
        head_size=16,
        seq_length=64,
        batch=8,
        eval_iters=2,
        starts={"hyperp": 0.06},
        held=0.06,
        limit=3,
        corpus="4MB",
        methods=("hyperp",),
        workers=1,
    ),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Models of one method that differ from its base in one axis at most; their learning rate is searched.

    Attributes:
        method: its name.
        axis: of :data:`AXES`.
        value: along the axis.
        width: hidden size.
        depth: layers.
        tokens: training tokens.
        topk: K; 0 without experts.
    """

    method: str
    axis: str
    value: int
    width: int
    depth: int
    tokens: int
    topk: int

    @property
    def model(self) -> tuple[str, int, int, int, int]:
        """Method and sizes."""
        return self.method, self.width, self.depth, self.tokens, self.topk


def parts(preset: Preset, names: Sequence[str]) -> list[Part]:
    """Every part of some methods, in the order in which they are trained; the base model is a part of three axes."""
    base, result = preset.base, []
    for method in (methods(preset)[name] for name in names):
        for axis in method.axes:
            others = [value for value in preset.values(axis) if value != base[axis]]
            for value in (base[axis], *others):
                sizes = {**base, "K": 0, axis: value}
                part = Part(method.name, axis, value, sizes["width"], sizes["depth"], sizes["tokens"], sizes["K"])
                result.append(part)
    return result


def spec(preset: Preset, names: Sequence[str], *, data: str, tokenizer: str) -> dict[str, Any]:
    """The sweep that trains some methods, as ``tools/sweep.py`` reads it.

    Args:
        preset: sizes.
        names: of methods.
        data: prefix of the corpus.
        tokenizer: its tokenizer.
    """
    blocks = []
    for part in {part.model: part for part in parts(preset, names)}.values():
        method = methods(preset)[part.method]
        fixed: dict[str, Any] = {
            "optimizer": method.optimizer,
            "num_layers": part.depth,
            "hidden_size": part.width,
            "num_attention_heads": part.width // preset.head_size,
            "train_tokens": part.tokens,
        }
        if part.topk:
            fixed |= {"moe_sparsity": preset.sparsity, "moe_topk": part.topk}
        if method.logit is not None:
            fixed["output_init_std"] = method.logit / part.width
        start = preset.starts.get(method.name, preset.starts[method.optimizer])
        search = {"start": start, "limit": preset.limit}
        axes = {"seed": list(preset.seeds), "eta0": search}
        blocks.append({"method": method.name, "set": fixed | method.fixed, "axes": axes})
    return {"set": common(preset, data, tokenizer), "blocks": blocks}


def common(preset: Preset, data: str, tokenizer: str) -> dict[str, Any]:
    """What all trainings share. Only one evaluation follows the first: that after the last step."""
    base = preset.base
    return {
        "kv_channels": preset.head_size,
        "seq_length": preset.seq_length,
        "micro_batch_size": preset.batch,
        "global_batch_size": preset.batch,
        "eval_interval": 10**9,
        "eval_iters": preset.eval_iters,
        "log_interval": 16,
        "bf16": preset.bf16,
        "base_depth": base["depth"],
        "base_hidden_size": base["width"],
        "base_tokens": base["tokens"],
        "base_batch_tokens": preset.batch * preset.seq_length,
        "split": "95,5,0",
        "data_path": [data],
        "tokenizer_model": tokenizer,
    }
