"""Every knob of a run: one dataclass field each, from which YAML keys and command-line flags are derived.

``Config.resolve`` fills in what follows from other fields (the architecture from ``depth``, the learning rate from
the transfer laws) and refuses impossible combinations, before any process group exists. Fields keep the names that
Megatron-LM gives its flags wherever it has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar

from megatron_hyperp import transfer
from megatron_hyperp.coefficients import SetName, Steps
from megatron_hyperp.role_laws import Sizes
from megatron_hyperp.transfer import LearningRate, Preset, Recipe

# A field that is None until ``Config.resolve`` derives it. Type checkers see the type of resolved configs.
if TYPE_CHECKING:
    T = TypeVar("T")
    Derived = Annotated[T, "None until resolved"]
else:
    Derived = Optional

NOT_NEGATIVE = "at least 0"
POSITIVE = "greater than 0"
FRACTION = "at least 0 and below 1"
SEED = "from 0 to 2^32 - 1"
# Of what a model has many of, and each of which costs time and memory.
COUNT, COUNT_FROM_1 = "at least 0 and 100,000 at most", "greater than 0 and 100,000 at most"
RANGES: dict[str, Callable[[float], bool]] = {
    NOT_NEGATIVE: lambda value: value >= 0,
    POSITIVE: lambda value: value > 0,
    FRACTION: lambda value: 0 <= value < 1,
    SEED: lambda value: 0 <= value < 2**32,
    COUNT: lambda value: 0 <= value <= 100_000,
    COUNT_FROM_1: lambda value: 1 <= value <= 100_000,
}


def knob(default: Any, help: str, allowed: str = NOT_NEGATIVE) -> Any:
    """Declare a field with its documentation and, if it is a number, its range: a key of ``RANGES``."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


def derived(help: str, allowed: str = POSITIVE) -> Any:
    """Declare a number that follows from other fields unless it is given; 0 is a value like any other."""
    return field(default=None, metadata={"help": help, "allowed": allowed, "derived": True})


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Architecture. ``depth`` derives the paper's shape; every explicit size overrides its part of it."""

    depth: int | None = knob(
        None, "number of layers d of the paper's architecture; all sizes left unset follow", COUNT_FROM_1
    )
    aspect_ratio: int = knob(
        128, "width per layer a, with --depth: hidden size a d, head size a, 2d heads, 4 KV groups", POSITIVE
    )
    num_layers: Derived[int] = derived("transformer layers [depth]", COUNT_FROM_1)
    hidden_size: Derived[int] = derived("model width w [aspect ratio x depth]")
    ffn_hidden_size: Derived[int] = derived("width of the SwiGLU branch [4 x hidden size]")
    num_attention_heads: Derived[int] = derived("query heads [2 x depth]")
    num_query_groups: Derived[int] = derived(
        "key-value heads, for grouped queries [gcd(4, heads) with --depth, else the heads]"
    )
    kv_channels: Derived[int] = derived("head size [aspect ratio with --depth, else hidden size / heads]")
    seq_length: int = knob(4096, "tokens per training sequence", POSITIVE)
    max_position_embeddings: int | None = knob(
        None,
        "positions that exports and generation allow, such as an imported model's; at least [--seq-length]",
        POSITIVE,
    )
    vocab_size: Derived[int] = derived("rows of the embedding [the tokenizer's, padded up]")
    unpadded_vocab_size: int | None = knob(
        None, "rows of the embedding before padding: exports have no others [the tokenizer's vocabulary]", POSITIVE
    )
    make_vocab_size_divisible_by: int = knob(
        128,
        "the tokenizer's vocabulary is padded to a multiple of this, times the tensor-parallel ranks if they do not"
        " divide that",
        POSITIVE,
    )
    qk_layernorm: bool = knob(True, "RMSNorm on queries and keys")
    untie_embeddings_and_output_weights: bool = knob(True, "separate token embedding and output layer")
    norm_epsilon: float = knob(1e-5, "epsilon of RMSNorm", POSITIVE)
    rotary_base: int = knob(10000, "base of the rotary position embedding", POSITIVE)
    softmax_scale: float | None = knob(None, "factor on attention logits [sqrt(128) / head size]", POSITIVE)
    residual_multiplier: float | None = knob(
        None, "factor on residual branches [1/sqrt(2L) under Depth-muP, else 1]", POSITIVE
    )
    logits_multiplier: float | None = knob(None, "factor on output logits [w0/w under muP (adamw), else 1]", POSITIVE)
    embedding_init_std: float | None = knob(
        None, "initial standard deviation of embeddings [1e-4, 0.02 when tied]", POSITIVE
    )
    output_init_std: float = knob(0.02, "initial standard deviation of the output layer; fixes its sphere", POSITIVE)

    @property
    def positions(self) -> int:
        """The positions that the model is declared to have: an imported model's own, or those of its training."""
        return self.seq_length if self.max_position_embeddings is None else self.max_position_embeddings


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """Mixture of experts, in the paper's terms (sparsity, top-k, shared expert) or in Megatron's."""

    moe_sparsity: int | None = knob(
        None, "S: all experts over active ones; with --moe-topk makes S x K experts of FFN size / K", COUNT_FROM_1
    )
    moe_topk: int | None = knob(None, "K: experts per token, the shared one included", COUNT_FROM_1)
    moe_shared_expert: bool = knob(False, "one of the K is shared by all tokens: K - 1 of S x K - 1 are routed")
    num_experts: Derived[int] = derived(
        "routed experts of each layer; 0: a dense model [S x K, less the shared one; else 0]", COUNT
    )
    moe_router_topk: Derived[int] = derived("routed experts per token [K, less the shared one; else 2]", NOT_NEGATIVE)
    moe_ffn_hidden_size: Derived[int] = derived("FFN size of an expert [FFN size / K; else the FFN size]", NOT_NEGATIVE)
    moe_shared_expert_intermediate_size: Derived[int] = derived(
        "FFN size of the shared expert; 0: there is none [that of an expert, if shared; else 0]", NOT_NEGATIVE
    )
    moe_gate: Literal["sqrt", "softmax"] = knob(
        "sqrt", "gates are the square roots of the top-k probabilities, so that K changes no output, or those"
    )
    moe_router_load_balancing_type: Literal["global", "aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = knob(
        "global", "switch loss over the whole global batch, one of Megatron-Core's losses, or none"
    )
    moe_balance_statistics: Literal["previous", "exact"] = knob(
        "previous", "loads in the global loss: of the batch before, or of this one by a forward pass ahead of time"
    )
    moe_aux_loss_coeff: float = knob(0.1, "weight of the load-balancing loss")
    moe_z_loss_coeff: float = knob(0.0, "weight of the router's z-loss")
    moe_expert_capacity_factor: float | None = knob(
        None,
        "tokens that an expert takes of a micro-batch and rank, over its fair share; others are dropped, so that the"
        " layout matters [none are]",
        POSITIVE,
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = knob("alltoall", "how tokens travel to their experts")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the model. What tensor and pipeline parallelism leave over is data parallelism."""

    tensor_model_parallel_size: int = knob(1, "ranks that share each matrix", POSITIVE)
    pipeline_model_parallel_size: int = knob(1, "pipeline stages", POSITIVE)
    num_virtual_stages_per_pipeline_rank: int = knob(
        1, "model chunks per pipeline stage (interleaved schedule)", POSITIVE
    )
    expert_model_parallel_size: int = knob(1, "ranks over which the experts of a layer are spread", POSITIVE)
    expert_tensor_parallel_size: int = knob(1, "ranks that share each matrix of an expert", POSITIVE)
    sequence_parallel: bool = knob(False, "split the sequence over the tensor-parallel ranks between matrices")
    overlap_grad_reduce: bool | None = knob(
        None, "reduce gradients to their owners during the backward pass [under CUDA, where streams allow it]"
    )
    overlap_param_gather: bool | None = knob(
        None, "gather new weights from their owners during the next forward pass [under CUDA]"
    )
    ddp_bucket_size: int | None = knob(
        None,
        "elements from which on a bucket of gradients is closed, once its owners are balanced"
        " [the larger of 40M and 1M x data-parallel ranks, or all in one without --overlap-grad-reduce]",
        POSITIVE,
    )
    distributed_timeout_minutes: float = knob(10.0, "a collective that waits longer ends the job", POSITIVE)


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """The update rule. Unset values come from the optimizer's recipe, see ``megatron_hyperp.transfer.RECIPES``."""

    optimizer: Literal["hyperp", "muonh", "normuonh", "muon", "normuon", "adamw"] = knob(
        "hyperp",
        "hyperp: MuonH with the transfer laws; muonh: without them; normuonh: NorMuon on spheres, with them; muon,"
        " normuon, adamw: baselines",
    )
    optimizer_rule: str | None = knob(
        None,
        "update rule of hidden matrices in place of the optimizer's: a name, such as normuonh, or FILE.py:CLASS"
        " (docs/api.md); the optimizer's laws and defaults stay",
    )
    router_rule: str | None = knob(None, "update rule of routers, such as adamw [that of hidden matrices]")
    lr: float | None = knob(None, "peak learning rate; set, it overrides the transfer law", POSITIVE)
    min_lr: float | None = knob(None, "learning rate at the end of the decay [0.1 x lr]")
    lr_decay_style: Literal["linear", "cosine", "WSD", "constant"] = knob("linear", "shape of the decay")
    lr_warmup_iters: int = knob(0, "iterations of linear warm-up; the sphere needs none")
    lr_wsd_decay_iters: int | None = knob(None, "last iterations over which WSD decays [a fifth of them]", POSITIVE)
    use_checkpoint_opt_param_scheduler: bool = knob(
        False,
        "resume with the checkpoint's schedule: its peak and smallest learning rate, warm-up, decay, length and weight"
        " decay, whatever the flags or the law for another batch size say",
    )
    weight_decay: float | None = knob(None, "weight decay lambda [hyperp, muonh: 0; muon: 0.1 d0/d; adamw: 0.1]")
    clip_grad: float = knob(1.0, "largest global gradient norm; 0 switches clipping off")
    muon_momentum: float = knob(0.95, "momentum mu of Muon", FRACTION)
    muon_nesterov: bool = knob(True, "orthogonalize mu M + G rather than M")
    momentum_dtype: Literal["fp32", "bf16"] = knob("fp32", "precision in which Muon's momentum is kept")
    matrix_split: Literal["fused", "component", "head"] = knob(
        "fused",
        "what is one matrix on one sphere: the fused QKV and gate/up weights (as in the paper), each of their"
        " components, or each head of QKV",
    )
    ns_steps: str | None = knob(
        None,
        "Newton-Schulz steps; families of matrices (attention, mlp, experts, router) may have their own, as in"
        " 5,experts=3 [those that the coefficient set is made for]",
    )
    ns_coefficients: SetName = knob("quintic", "coefficient set of Newton-Schulz (docs/newton-schulz.md)")
    ns_form: Literal["auto", "standard", "gram"] = knob(
        "auto", "iterate on X, or on X X^T alone (gram: fp32 or fp16); auto takes what needs fewer FLOPs"
    )
    ns_strategy: Literal["auto", "gather", "all_to_all", "gram"] = knob(
        "auto", "how tensor-parallel ranks share Newton-Schulz; auto takes the cheapest by the printed cost model"
    )
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = knob(
        "auto", "precision of Newton-Schulz [bf16 under CUDA, fp16 there with gram; fp32 on CPU, where half is slower]"
    )
    ns_backend: Literal["torch", "quack"] = knob(
        "torch",
        "what computes Newton-Schulz's symmetric products: torch, or quack's kernels (Hopper or later, fp16 or bf16,"
        " pip install megatron-hyperp[kernels])",
    )
    zero_gradients: Literal["fade", "walk"] = knob(
        "fade",
        "what a matrix on its sphere does while its gradient is exactly zero, such as an expert without tokens: its"
        " step fades as its momentum does, 20 steps' worth in all; or it walks on at full step along its last momentum",
    )
    radius_scale: float = knob(1.0, "factor on the radii of all MuonH matrices", POSITIVE)
    radius: Literal["stateless", "from-weights"] = knob(
        "stateless",
        "radii of spheres: from shapes, or those of the weights that a model had when it was imported (continued"
        " training; tools/convert_checkpoint.py measures them, checkpoints keep them)",
    )
    adam_beta1: float = knob(0.9, "decay of Adam's first moment", FRACTION)
    adam_beta2: float = knob(0.95, "decay of Adam's second moment", FRACTION)
    adam_eps: float = knob(1e-8, "epsilon of Adam", POSITIVE)
    embedding_lr_mult: float = knob(1.0, "factor on the learning rate of the token embedding")
    adam_lr_mult: float = knob(1.0, "factor on the learning rate of norm gains, biases and the output layer")
    output_lr_mult: float | None = knob(None, "factor on the learning rate of the output layer [--adam-lr-mult]")
    router_lr_mult: float = knob(1.0, "factor on the learning rate of the routers of experts")
    qk_norm_lr_mult: float = knob(
        1.0,
        "further factor on that of the gains on queries and keys; 0 leaves them as they are: 1 in a new model, whose"
        " attention logits then are sqrt(128) at most, with the usual --softmax-scale",
    )
    lr_exponents: list[str] = field(
        default_factory=list,
        metadata={
            "help": "ROLE:AXIS=EXPONENT[,AXIS=EXPONENT] ..., such as embedding:width=-0.5,depth=0: powers of width,"
            " depth, tokens or batch over the base model's, in the learning rate of hidden, router, output, embedding"
            " or vector, beyond the law that all share [0; under muP (adamw) hidden:width=-1 router:width=-1]"
        },
    )

    @property
    def has_spheres(self) -> bool:
        """Whether hidden matrices are trained on spheres.

        Raises:
            UsageError: ``--optimizer-rule`` names no rule.
        """
        if self.optimizer_rule is None:
            return transfer.RECIPES[self.optimizer].spheres
        # It imports torch, which a command line does without until it trains.
        from megatron_hyperp.optim.rules import rule_class

        return rule_class(self.optimizer_rule).on_sphere

    @property
    def steps(self) -> Steps:
        """Newton-Schulz steps, read. Raises: UsageError, text that says none."""
        return Steps.parse(self.ns_steps, self.ns_coefficients)


@dataclass(kw_only=True, slots=True)
class TransferConfig:
    """The base model from which the learning rate transfers."""

    lr_preset: Literal["paper", "marin-2608"] = knob(
        "paper",
        "law of the learning rate: of the optimizer's recipe, or Marin's of August 2026 for MuonH, 34.35 T^-0.346"
        " w^-0.345 sqrt(B / 8192), 3/13 of it for router, embedding and gains (docs/scaling.md)",
    )
    eta0: float | None = knob(None, "learning rate tuned on the base model [of the optimizer's recipe]", POSITIVE)
    base_depth: int = knob(transfer.BASE_DEPTH, "depth d0 of the base model", POSITIVE)
    base_hidden_size: int | None = knob(
        None, "width w0 of the base model, where a law has a power of the width [aspect ratio x base depth]", POSITIVE
    )
    base_tokens: float = knob(float(transfer.BASE_TOKENS), "training tokens T0 of the base model", POSITIVE)
    base_batch_tokens: int = knob(transfer.BASE_BATCH_TOKENS, "tokens per batch B0 of the base model", POSITIVE)
    token_exponent: float = knob(transfer.TOKEN_EXPONENT, "exponent of (T/T0)^-x in the learning rate")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read. Prefixes name Megatron's .bin/.idx pairs."""

    data_path: list[str] = field(
        default_factory=list, metadata={"help": "PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ..."}
    )
    mock_data: bool = knob(
        False, "train on synthetic data, without --data-path and --tokenizer-model: smoke tests, measurements of speed"
    )
    split: str = knob("969,30,1", "shares of training, validation and test documents")
    tokenizer_model: str | None = knob(
        None, "SentencePiece model, Hugging Face tokenizer.json, a folder with one of them, or null:VOCABULARY"
    )
    prepend_bos: bool = knob(
        False,
        "documents begin with the beginning-of-sequence token; corpora of tools/preprocess_data.py record it, so that"
        " only others need the flag",
    )
    data_cache_path: str | None = knob(None, "folder of the index caches [beside the data]")
    num_workers: int = knob(0, "data-loading processes per rank; 0: the rank loads its data itself")
    eod_mask_loss: bool = knob(False, "no loss on end-of-document tokens")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long, how much at a time, how precisely."""

    micro_batch_size: int = knob(1, "sequences per forward pass and rank", POSITIVE)
    global_batch_size: Derived[int] = derived("sequences per step over all ranks [base batch tokens / sequence length]")
    train_iters: Derived[int] = derived(
        "optimizer steps; when a run resumes with another batch size, of the first one [from the tokens]"
    )
    train_tokens: Derived[float] = derived("training tokens [T0 N(d)/N(d0) with --depth]")
    exit_interval: int = knob(0, "stop at the first multiple of this iteration, saving; 0: never, run to the end")
    exit_duration_in_mins: float | None = knob(
        None, "stop after the step in which the run has lasted so long, saving, with exit code 75 [run on]", POSITIVE
    )
    eval_interval: int = knob(100, "iterations between evaluations; 0 switches them off")
    eval_iters: int = knob(10, "batches per evaluation, the same ones each time; 0 switches evaluation off")
    seed: int = knob(1234, "seed of initialisation and data order", SEED)
    deterministic_mode: bool = knob(
        False, "kernels and collectives of which two runs give the same bits; what has none is refused"
    )
    check_weight_hash_across_dp_replicas_interval: int = knob(
        0,
        "iterations between comparisons of what ranks should hold alike, over data- and tensor-parallel ranks and tied"
        " embeddings, before each save as well; a difference stops the run; 0: none",
    )
    transformer_impl: Literal["local", "transformer_engine"] | None = knob(
        None, "layers of the model: Megatron-Core's local ones, or TransformerEngine's [the latter where they can run]"
    )
    bf16: bool = knob(False, "bf16 weights and activations; gradients, master weights and momentum stay fp32")
    fp8_format: Literal["none", "hybrid", "e4m3"] = knob(
        "none", "FP8 in the linear layers of transformer layers: e4m3 with e5m2 gradients (hybrid), or e4m3 alone"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "rowwise", "blockwise", "mxfp8"] = knob(
        "tensorwise", "which elements share a scale; delayed: those of a tensor, from earlier steps"
    )
    fp8_amax_history_len: int = knob(
        1, "delayed: steps of which the largest element gives the scale; above 1 with --fp8-amax-compute-algo", POSITIVE
    )
    fp8_amax_compute_algo: Literal["most_recent", "max"] = knob(
        "most_recent", "delayed: scales follow from the last step, or from the largest element of the history"
    )
    fp8_margin: int = knob(0, "delayed: powers of two between the largest element and the format's largest number")
    fp8_emulation: bool = knob(False, "round to FP8 and back on any device, to study its numerics; slower than no FP8")
    fp8_weight_scale: Literal["current", "sphere"] = knob(
        "current", "scales of weights: from the largest element, or fixed by the radius of the sphere (tensorwise)"
    )
    fp8_param_gather: bool = knob(
        False,
        "gather new weights of FP8 layers from their owners in FP8: half the bytes, the same training; with --bf16 and"
        " tensorwise",
    )
    num_layers_at_start_in_bf16: int = knob(0, "first layers that stay out of FP8")
    num_layers_at_end_in_bf16: int = knob(0, "last layers that stay out of FP8")
    recompute_granularity: Literal["none", "selective", "full"] = knob(
        "none", "activations to recompute: none, those of core attention, or whole layers"
    )
    recompute_method: Literal["uniform", "block"] = knob("uniform", "with full: every layer in groups, or the first N")
    recompute_num_layers: int = knob(1, "with full: layers per group, or N", POSITIVE)
    attention_backend: Literal["local", "sdpa"] | None = knob(
        None,
        "core attention: Megatron-Core's, which keeps all probabilities, or torch's fused kernel [TransformerEngine's"
        " with its layers; else sdpa, but local with --recompute-granularity selective]",
    )
    cross_entropy_loss_fusion: bool = knob(False, "loss in fewer kernels (CUDA; native: with --bf16)")
    cross_entropy_fusion_impl: Literal["native", "te"] = knob(
        "native", "fused loss: Megatron-Core's, whose logits have bf16 gradients, or TransformerEngine's"
    )
    gradient_accumulation_fusion: bool | None = knob(
        None, "add weight gradients to the fp32 sums in the product's kernel, apex's [under CUDA, if it is installed]"
    )

    @property
    def local_attention(self) -> str:
        """Core attention of Megatron-Core's local layers: as asked, else the fused one unless it is recomputed."""
        return self.attention_backend or ("local" if self.recompute_granularity == "selective" else "sdpa")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept on disk."""

    save: str | None = knob(None, "folder for checkpoints [none are written]")
    load: str | None = knob(None, "folder to resume from; may be empty at the first start if it is the --save folder")
    pretrained_checkpoint: str | None = knob(
        None,
        "folder of a checkpoint whose weights the run starts with at iteration 0, as long as --load and --save hold no"
        " checkpoint; after that the run resumes from its own",
    )
    save_interval: int = knob(0, "iterations between checkpoints; 0: only at the end")
    keep: int = knob(0, "newest checkpoints to keep, older ones are deleted; 0 switches deletion off")
    async_save: bool = knob(False, "write checkpoints beside the training; a save waits for the one before")


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and where."""

    run_dir: str = knob("runs/default", "folder of config.yaml and metrics.jsonl")
    log_interval: int = knob(10, "iterations between log lines", POSITIVE)
    stability_interval: int = knob(
        10, "iterations between stability indicators (Z, RMS, outliers, angles, ...); 0: none"
    )
    alarm: list[str] = field(
        default_factory=list,
        metadata={
            "help": '"METRIC > NUMBER [* smoothed] [: warn|save|stop]" ..., such as "loss > 1.5 * smoothed: save"'
        },
    )
    heartbeat_interval: float = knob(10.0, "seconds between signs of life of each rank, in RUN_DIR/heartbeats; 0: none")
    quiet: bool = knob(False, "print warnings and the summary alone")
    profile: str | None = knob(None, "FIRST:LAST iterations to trace with PyTorch's profiler")
    profile_ranks: list[str] = field(default_factory=lambda: ["0"], metadata={"help": "RANK ... to trace [0]"})
    peak_tflops: float | None = knob(
        None, "peak dense TFLOP/s of one rank's device, for MFU [known GPUs: looked up]", POSITIVE
    )
    tensorboard_dir: str | None = knob(None, "folder for TensorBoard events")
    wandb_project: str | None = knob(None, "Weights & Biases project (WANDB_MODE=offline needs no network)")
    wandb_exp_name: str | None = knob(None, "Weights & Biases run name [the run folder's name]")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run; sections are the top-level keys of the YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
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
    def recipe(self) -> Recipe:
        """The laws that the chosen optimizer applies."""
        return transfer.RECIPES[self.optimizer.optimizer]

    @property
    def batch_tokens(self) -> int:
        """Tokens per global batch."""
        return self.training.global_batch_size * self.model.seq_length

    @property
    def eta0(self) -> float:
        """The base learning rate: as given, else the preset's, else the recipe's, another one for experts."""
        if self.transfer.eta0 is not None:
            return self.transfer.eta0
        if self.preset is not None:
            return self.preset.law.multiplier(self.base_sizes, self.preset.unit)
        return self.recipe.moe_eta0 if self.moe.num_experts else self.recipe.eta0

    @property
    def preset(self) -> Preset | None:
        """The law that takes the place of the recipe's; None for the recipe's own."""
        return transfer.PRESETS[self.transfer.lr_preset]

    @property
    def has_batch_law(self) -> bool:
        """Whether the learning rate that all roles share goes with sqrt(B)."""
        return self.recipe.batch_law if self.preset is None else self.preset.law.batch == 0.5

    @property
    def sizes(self) -> Sizes:
        """What learning rates scale with."""
        return Sizes(
            width=self.model.hidden_size,
            depth=self.model.num_layers,
            tokens=self.training.train_tokens,
            batch=self.batch_tokens,
        )

    @property
    def base_sizes(self) -> Sizes:
        """The same of the base model; without a width of its own it has the model's."""
        base = self.transfer
        return Sizes(
            width=base.base_hidden_size or self.model.hidden_size,
            depth=base.base_depth,
            tokens=base.base_tokens,
            batch=base.base_batch_tokens,
        )

    def learning_rate(self) -> LearningRate:
        """The transferred peak learning rate with its factors, or the explicit ``--lr`` with none; and each role's."""
        from megatron_hyperp.learning_rates import role_rates

        return dataclasses.replace(self._shared_learning_rate(), roles=role_rates(self))

    def _shared_learning_rate(self) -> LearningRate:
        if self.optimizer.lr is not None:
            return LearningRate(self.optimizer.lr, ())
        base = self.transfer
        if self.preset is not None:
            return transfer.preset_learning_rate(
                base.lr_preset, self.sizes, base=self.base_sizes, eta0=self.transfer.eta0
            )
        return transfer.learning_rate(
            self.recipe,
            eta0=self.eta0,
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
        from megatron_hyperp.resolve import resolve

        return resolve(self, world_size, tokenizer_vocab_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same part of the model."""
    return world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches that each rank sees in a step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


def flag_name(field_name: str) -> str:
    """``train_iters`` -> ``--train-iters``."""
    return "--" + field_name.replace("_", "-")


def width_multiplier(config: Config) -> float:
    """MuP's w0/w (Tensor Programs V), or 1 for recipes without it: of logits; matrices have it in their law."""
    base = config.transfer.base_hidden_size
    return base / config.model.hidden_size if config.recipe.width_mup and base else 1.0
