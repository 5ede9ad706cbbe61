"""Every knob of a run: one dataclass field each, from which YAML keys and command-line flags are derived.

``Config.resolve`` fills in what follows from other fields (the architecture from ``depth``, the learning rate from
the transfer laws) and refuses impossible combinations, before any process group exists. Fields keep the names that
Megatron-LM gives its flags wherever it has one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hyperp import estimate, transfer
from megatron_hyperp.errors import UsageError


def knob(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a dataclass field with its documentation; lists are copied for each instance."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Architecture. ``depth`` derives the paper's shape; every explicit size overrides its part of it."""

    depth: int | None = knob(None, "number of layers d of the paper's architecture; all sizes left unset follow")
    aspect_ratio: int = knob(128, "width per layer a, with --depth: hidden size a d, head size a, 2d heads, 4 KV groups")
    num_layers: int = knob(0, "transformer layers [depth]")
    hidden_size: int = knob(0, "model width w [aspect ratio x depth]")
    ffn_hidden_size: int = knob(0, "width of the SwiGLU branch [4 x hidden size]")
    num_attention_heads: int = knob(0, "query heads [2 x depth]")
    num_query_groups: int = knob(0, "key-value heads of grouped-query attention [4 with --depth, else the heads]")
    kv_channels: int = knob(0, "head size [aspect ratio with --depth, else hidden size / heads]")
    seq_length: int = knob(4096, "tokens per training sequence")
    vocab_size: int = knob(0, "rows of the embedding [the tokenizer's, padded up]")
    make_vocab_size_divisible_by: int = knob(128, "the tokenizer's vocabulary is padded to a multiple of this")
    qk_layernorm: bool = knob(True, "RMSNorm on queries and keys")
    untie_embeddings_and_output_weights: bool = knob(True, "separate token embedding and output layer")
    norm_epsilon: float = knob(1e-5, "epsilon of RMSNorm")
    rotary_base: int = knob(10000, "base of the rotary position embedding")
    softmax_scale: float | None = knob(None, "factor on attention logits [sqrt(128) / head size]")
    residual_multiplier: float | None = knob(None, "factor on residual branches [1/sqrt(2L) under Depth-muP, else 1]")
    logits_multiplier: float | None = knob(None, "factor on output logits [w0/w under muP (adamw), else 1]")
    embedding_init_std: float | None = knob(None, "initial standard deviation of embeddings [1e-4, 0.02 when tied]")
    output_init_std: float = knob(0.02, "initial standard deviation of the output layer; fixes its sphere")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the model. What tensor and pipeline parallelism leave over is data parallelism."""

    tensor_model_parallel_size: int = knob(1, "ranks that share each matrix")
    pipeline_model_parallel_size: int = knob(1, "pipeline stages")
    num_virtual_stages_per_pipeline_rank: int = knob(1, "model chunks per pipeline stage (interleaved schedule)")
    sequence_parallel: bool = knob(False, "split the sequence over the tensor-parallel ranks between matrices")
    distributed_timeout_minutes: int = knob(10, "a collective that waits longer ends the job")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """The update rule. Unset values come from the optimizer's recipe, see ``megatron_hyperp.transfer.RECIPES``."""

    optimizer: Literal["hyperp", "muonh", "muon", "adamw"] = knob(
        "hyperp", "hyperp: MuonH with the transfer laws; muonh: without them; muon, adamw: baselines"
    )
    lr: float | None = knob(None, "peak learning rate; set, it overrides the transfer law")
    min_lr: float | None = knob(None, "learning rate at the end of the decay [0.1 x lr]")
    lr_decay_style: Literal["linear", "cosine", "WSD", "constant"] = knob("linear", "shape of the decay")
    lr_warmup_iters: int = knob(0, "iterations of linear warm-up; the sphere needs none")
    lr_wsd_decay_iters: int | None = knob(None, "last iterations over which WSD decays [a fifth of them]")
    weight_decay: float | None = knob(None, "weight decay lambda [hyperp, muonh: 0; muon: 0.1 d0/d; adamw: 0.1]")
    clip_grad: float = knob(1.0, "largest global gradient norm; 0 switches clipping off")
    muon_momentum: float = knob(0.95, "momentum mu of Muon")
    muon_nesterov: bool = knob(True, "orthogonalize mu M + G rather than M")
    ns_steps: int = knob(5, "Newton-Schulz steps")
    ns_coefficients: Literal["quintic", "polar_express"] = knob("quintic", "coefficient set of Newton-Schulz")
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = knob(
        "auto", "precision of Newton-Schulz [auto: bf16 under CUDA, fp32 on CPU, where bf16 is slower]"
    )
    radius_scale: float = knob(1.0, "factor on the radii of all MuonH matrices")
    adam_beta1: float = knob(0.9, "decay of Adam's first moment")
    adam_beta2: float = knob(0.95, "decay of Adam's second moment")
    adam_eps: float = knob(1e-8, "epsilon of Adam")
    embedding_lr_mult: float = knob(1.0, "factor on the learning rate of the token embedding")
    adam_lr_mult: float = knob(1.0, "factor on the learning rate of norm gains, biases and the output layer")


@dataclass(kw_only=True, slots=True)
class TransferConfig:
    """The base model from which the learning rate transfers."""

    eta0: float | None = knob(None, "learning rate tuned on the base model [of the optimizer's recipe]")
    base_depth: int = knob(transfer.BASE_DEPTH, "depth d0 of the base model")
    base_hidden_size: int | None = knob(None, "width w0 of the base model [aspect ratio x base depth]")
    base_tokens: float = knob(float(transfer.BASE_TOKENS), "training tokens T0 of the base model")
    base_batch_tokens: int = knob(transfer.BASE_BATCH_TOKENS, "tokens per batch B0 of the base model")
    token_exponent: float = knob(transfer.TOKEN_EXPONENT, "exponent of (T/T0)^-x in the learning rate")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read. Prefixes name Megatron's .bin/.idx pairs."""

    data_path: list[str] = knob([], "PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...")
    split: str = knob("969,30,1", "shares of training, validation and test documents")
    tokenizer_model: str | None = knob(None, "SentencePiece .model, Hugging Face tokenizer.json, or null:VOCABULARY")
    data_cache_path: str | None = knob(None, "folder of the index caches [beside the data]")
    num_workers: int = knob(0, "data-loading processes per rank")
    eod_mask_loss: bool = knob(False, "no loss on end-of-document tokens")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long, how much at a time, how precisely."""

    micro_batch_size: int = knob(1, "sequences per forward pass and rank")
    global_batch_size: int = knob(0, "sequences per step over all ranks [base batch tokens / sequence length]")
    train_iters: int = knob(0, "optimizer steps [from the tokens]")
    train_tokens: float = knob(0.0, "training tokens [T0 N(d)/N(d0) with --depth]")
    exit_interval: int = knob(0, "stop at the first multiple of this iteration, saving; 0: run to the end")
    eval_interval: int = knob(100, "iterations between evaluations; 0 switches them off")
    eval_iters: int = knob(10, "batches per evaluation, the same ones each time")
    seed: int = knob(1234, "seed of initialisation and data order")
    bf16: bool = knob(False, "bf16 weights and activations; gradients, master weights and momentum stay fp32")
    recompute_granularity: Literal["none", "selective", "full"] = knob(
        "none", "activations to recompute: none, those of core attention, or whole layers"
    )
    recompute_method: Literal["uniform", "block"] = knob("uniform", "with full: every layer in groups, or the first N")
    recompute_num_layers: int = knob(1, "with full: layers per group, or N")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept on disk."""

    save: str | None = knob(None, "folder for checkpoints [none are written]")
    load: str | None = knob(None, "folder to resume from; may be empty at the first start if it is the --save folder")
    save_interval: int = knob(0, "iterations between checkpoints; 0: only at the end")
    keep: int = knob(0, "newest checkpoints to keep; 0: all")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and where."""

    run_dir: str = knob("runs/default", "folder of config.yaml and metrics.jsonl")
    log_interval: int = knob(10, "iterations between log lines")
    peak_tflops: float | None = knob(None, "peak dense TFLOP/s of one rank's device, for MFU [known GPUs: looked up]")
    tensorboard_dir: str | None = knob(None, "folder for TensorBoard events")
    wandb_project: str | None = knob(None, "Weights & Biases project (WANDB_MODE=offline needs no network)")
    wandb_exp_name: str | None = knob(None, "Weights & Biases run name [the run folder's name]")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run; sections are the top-level keys of the YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return sections of plain values, ready for YAML."""
        return dataclasses.asdict(self)

    @property
    def recipe(self) -> transfer.Recipe:
        """The laws that the chosen optimizer applies."""
        return transfer.RECIPES[self.optimizer.optimizer]

    @property
    def batch_tokens(self) -> int:
        """Tokens per global batch."""
        return self.training.global_batch_size * self.model.seq_length

    def learning_rate(self) -> transfer.LearningRate:
        """The transferred peak learning rate with its factors, or the explicit ``--lr`` with none."""
        if self.optimizer.lr is not None:
            return transfer.LearningRate(self.optimizer.lr, ())
        base = self.transfer
        return transfer.learning_rate(
            self.recipe,
            eta0=_default(base.eta0, self.recipe.eta0),
            depth=self.model.num_layers,
            tokens=self.training.train_tokens,
            batch_tokens=self.batch_tokens,
            base_depth=base.base_depth,
            base_tokens=base.base_tokens,
            base_batch_tokens=base.base_batch_tokens,
            token_exponent=base.token_exponent,
        )

    def resolve(self, *, world_size: int = 1, tokenizer_vocab_size: int | None = None) -> Config:
        """Return a complete, checked copy.

        Args:
            world_size: ranks of the job.
            tokenizer_vocab_size: tokens that the tokenizer knows; None if there is no tokenizer at hand.

        Raises:
            UsageError: a value or combination that cannot run; the message says what may.
        """
        config = copy.deepcopy(self)
        try:
            _check_ranges(config)
            _resolve_architecture(config.model, tokenizer_vocab_size)
            _check_parallelism(config, world_size)
            _resolve_duration(config)
            _resolve_scaling(config)
        except UsageError as error:
            error.same_on_all_ranks = True
            raise
        return config


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same part of the model."""
    return world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def flag_name(field_name: str) -> str:
    """``train_iters`` -> ``--train-iters``."""
    return "--" + field_name.replace("_", "-")


POSITIVE = ["aspect_ratio", "seq_length", "make_vocab_size_divisible_by", "norm_epsilon", "rotary_base", "softmax_scale", "residual_multiplier", "logits_multiplier", "embedding_init_std", "output_init_std", "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", "distributed_timeout_minutes", "lr", "ns_steps", "radius_scale", "adam_eps", "eta0", "depth", "base_depth", "base_hidden_size", "base_tokens", "base_batch_tokens", "micro_batch_size", "recompute_num_layers", "log_interval", "peak_tflops", "lr_wsd_decay_iters"]
FRACTIONS = ["muon_momentum", "adam_beta1", "adam_beta2"]


def _check_ranges(config: Config) -> None:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            value = getattr(values, item.name)
            if value is None or isinstance(value, (bool, str, list)):
                continue
            flag = flag_name(item.name)
            if not math.isfinite(value):
                raise UsageError(f"{flag} is {value}; it must be finite")
            if item.name in POSITIVE and value <= 0:
                raise UsageError(f"{flag} is {value:g}; it must be greater than 0")
            if item.name in FRACTIONS and not 0 <= value < 1:
                raise UsageError(f"{flag} is {value:g}; it must be at least 0 and below 1")
            if value < 0:
                raise UsageError(f"{flag} is {value:g}; it must not be negative")


def _resolve_architecture(model: ModelConfig, tokenizer_vocab_size: int | None) -> None:
    if model.depth is not None:
        heads = 2 * model.depth
        _fill(model, num_layers=model.depth, hidden_size=model.aspect_ratio * model.depth, num_attention_heads=heads)
        _fill(model, kv_channels=model.aspect_ratio, num_query_groups=math.gcd(4, model.num_attention_heads))
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(model, name) <= 0:
            raise UsageError(f"the architecture lacks {flag_name(name)}; give it, or --depth for the paper's shape")
    if not model.kv_channels and model.hidden_size % model.num_attention_heads:
        raise UsageError(
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {model.num_attention_heads};"
            " change one, or give --kv-channels"
        )
    _fill(
        model,
        ffn_hidden_size=4 * model.hidden_size,
        kv_channels=model.hidden_size // model.num_attention_heads,
        num_query_groups=model.num_attention_heads,
    )
    if model.num_attention_heads % model.num_query_groups:
        raise UsageError(
            f"--num-query-groups {model.num_query_groups} does not divide --num-attention-heads"
            f" {model.num_attention_heads}; every group serves the same number of heads"
        )
    if model.kv_channels % 2:
        raise UsageError(f"--kv-channels {model.kv_channels} is odd; rotary embeddings need an even head size")
    _resolve_vocabulary(model, tokenizer_vocab_size)
    if model.embedding_init_std is None:
        model.embedding_init_std = 1e-4 if model.untie_embeddings_and_output_weights else 0.02
    if model.softmax_scale is None:
        model.softmax_scale = transfer.softmax_scale(model.kv_channels)


def _resolve_vocabulary(model: ModelConfig, tokenizer_vocab_size: int | None) -> None:
    if not model.vocab_size:
        if tokenizer_vocab_size is None:
            raise UsageError("the size of the vocabulary is not known; give --tokenizer-model or --vocab-size")
        multiple = model.make_vocab_size_divisible_by
        model.vocab_size = math.ceil(tokenizer_vocab_size / multiple) * multiple
    elif tokenizer_vocab_size is not None and tokenizer_vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer knows {tokenizer_vocab_size} tokens, more than --vocab-size {model.vocab_size};"
            " raise it, or leave it out to take the tokenizer's"
        )


def _check_parallelism(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise UsageError(
            f"{world_size} rank(s) cannot hold tensor x pipeline parallelism {tp} x {pp} = {tp * pp};"
            f" start a multiple of {tp * pp} ranks, or lower the sizes"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        if getattr(model, name) % tp:
            raise UsageError(
                f"--tensor-model-parallel-size {tp} does not divide {flag_name(name)} {getattr(model, name)};"
                " every rank holds a whole share of heads, groups, columns and vocabulary"
            )
    if parallel.sequence_parallel and tp == 1:
        raise UsageError("--sequence-parallel needs --tensor-model-parallel-size above 1; leave it out, or raise that")
    if parallel.sequence_parallel and model.seq_length % tp:
        raise UsageError(f"--tensor-model-parallel-size {tp} does not divide --seq-length {model.seq_length}")
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    if chunks > 1 and pp == 1:
        raise UsageError("--num-virtual-stages-per-pipeline-rank above 1 needs --pipeline-model-parallel-size above 1")
    if model.num_layers % (pp * chunks):
        raise UsageError(
            f"--num-layers {model.num_layers} is not divisible by pipeline stages x virtual stages {pp} x {chunks};"
            " every chunk holds the same number of layers"
        )
    _check_batch(config, world_size)
    if config.training.recompute_granularity == "full" and (
        config.training.recompute_num_layers > model.num_layers // (pp * chunks)
    ):
        raise UsageError(
            f"--recompute-num-layers {config.training.recompute_num_layers} is more than the"
            f" {model.num_layers // (pp * chunks)} layers of a pipeline stage; lower it"
        )


def _check_batch(config: Config, world_size: int) -> None:
    training, parallel = config.training, config.parallel
    _fill(training, global_batch_size=max(1, config.transfer.base_batch_tokens // config.model.seq_length))
    share = training.micro_batch_size * data_parallel_size(config, world_size)
    if training.global_batch_size % share:
        near = sorted({max(share, training.global_batch_size // share * share), -(-training.global_batch_size // share) * share})
        raise UsageError(
            f"--global-batch-size {training.global_batch_size} is not divisible by --micro-batch-size x data-parallel"
            f" ranks = {share}; the nearest that are: {' and '.join(map(str, near))}"
        )
    micro_batches, pp = training.global_batch_size // share, parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and micro_batches % pp:
        raise UsageError(
            f"{micro_batches} micro-batches per step are not divisible by --pipeline-model-parallel-size {pp};"
            " the interleaved schedule needs that: change --global-batch-size"
        )


def _resolve_duration(config: Config) -> None:
    training, batch = config.training, config.batch_tokens
    if training.train_iters and training.train_tokens and training.train_iters != math.ceil(training.train_tokens / batch):
        raise UsageError(
            f"--train-iters {training.train_iters} and --train-tokens {training.train_tokens:g} contradict each other"
            f" at {batch} tokens per batch; give one"
        )
    if not training.train_iters:
        if not training.train_tokens:
            training.train_tokens = float(_token_budget(config))
        training.train_iters = math.ceil(training.train_tokens / batch)
    training.train_tokens = float(training.train_tokens or training.train_iters * batch)


def _token_budget(config: Config) -> int:
    """T(d), the base model being the one that --depth makes of the base depth."""
    if config.model.depth is None:
        raise UsageError("how long to train is not known; give --train-iters or --train-tokens (--depth derives them)")
    base = ModelConfig(
        depth=config.transfer.base_depth,
        aspect_ratio=config.model.aspect_ratio,
        vocab_size=config.model.vocab_size,
        seq_length=config.model.seq_length,
        untie_embeddings_and_output_weights=config.model.untie_embeddings_and_output_weights,
    )
    _resolve_architecture(base, None)
    parameters = estimate.parameter_count(config.model)
    return transfer.token_budget(parameters, estimate.parameter_count(base), config.transfer.base_tokens)


def _resolve_scaling(config: Config) -> None:
    model, optimizer, recipe = config.model, config.optimizer, config.recipe
    if model.residual_multiplier is None:
        model.residual_multiplier = transfer.residual_multiplier(recipe, model.num_layers)
    if config.transfer.base_hidden_size is None:
        config.transfer.base_hidden_size = model.aspect_ratio * config.transfer.base_depth
    if model.logits_multiplier is None:
        model.logits_multiplier = width_multiplier(config)
    if optimizer.weight_decay is None:
        optimizer.weight_decay = transfer.weight_decay(
            recipe,
            base_weight_decay=recipe.weight_decay,
            depth=model.num_layers,
            base_depth=config.transfer.base_depth,
        )
    peak = config.learning_rate().value
    if optimizer.min_lr is not None and optimizer.min_lr > peak:
        raise UsageError(f"--min-lr {optimizer.min_lr:g} is above the peak learning rate {peak:g}; lower it")
    if optimizer.min_lr is None:
        optimizer.min_lr = 0.1 * peak
    iterations = config.training.train_iters
    if optimizer.lr_warmup_iters >= iterations:
        raise UsageError(f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves none of the {iterations} iterations")
    if optimizer.lr_wsd_decay_iters is None:
        optimizer.lr_wsd_decay_iters = max(1, iterations // 5)
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters + optimizer.lr_warmup_iters > iterations:
        raise UsageError(f"--lr-wsd-decay-iters {optimizer.lr_wsd_decay_iters} is more than the iterations after warm-up")


def width_multiplier(config: Config) -> float:
    """MuP's w0/w for matrix learning rates and logits (Tensor Programs V), or 1 for recipes without it."""
    base = config.transfer.base_hidden_size
    return base / config.model.hidden_size if config.recipe.width_mup and base else 1.0


def _fill(section: Any, **defaults: int) -> None:
    """Set those of the fields that are still 0."""
    for name, value in defaults.items():
        if not getattr(section, name):
            setattr(section, name, value)
