"""What of FP8, layers and kernels cannot go together; a part of completing a config (``resolve.py``)."""

from __future__ import annotations

from megatron_hyperp.config import Config, TrainingConfig
from megatron_hyperp.errors import UsageError
from megatron_hyperp.text import multiples

# TransformerEngine's products in FP8 take multiples of these numbers of elements, in every dimension.
_FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def check(config: Config) -> None:
    """Refuse precisions and kernels that do not go together, wherever a run takes place.

    What this machine lacks for them is looked at later (``training/preflight.py``).

    Raises:
        UsageError: the first of them.
    """
    _check_delayed_scaling(config.training)
    _check_fp8(config)
    _check_kernels(config.training)


def _check_fp8(config: Config) -> None:
    training, layers = config.training, config.model.num_layers
    start, end = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    if training.fp8_format == "none":
        static = training.fp8_weight_scale == "sphere"
        for flag, given in (
            ("--fp8-emulation", training.fp8_emulation),
            ("--fp8-weight-scale sphere", static),
            ("--fp8-param-gather", training.fp8_param_gather),
            ("--num-layers-at-start-in-bf16", start),
            ("--num-layers-at-end-in-bf16", end),
        ):
            if given:
                raise UsageError(f"{flag} needs --fp8-format; give hybrid or e4m3, or leave it out")
        return
    if start + end >= layers:
        raise UsageError(
            f"--num-layers-at-start-in-bf16 {start} and --num-layers-at-end-in-bf16 {end} leave none of the {layers}"
            " layers to FP8; lower them, or leave out --fp8-format"
        )
    if training.fp8_emulation:
        if training.transformer_impl == "transformer_engine":
            raise UsageError(
                "--fp8-emulation is of Megatron-Core's local layers, not of --transformer-impl transformer_engine;"
                " leave one of them out"
            )
    else:
        _check_fp8_layers(config)
    if training.fp8_param_gather:
        if training.fp8_recipe != "tensorwise":
            raise UsageError(
                f"--fp8-param-gather takes one scale a weight, which --fp8-recipe {training.fp8_recipe} has not;"
                " give tensorwise, or leave it out"
            )
        if not training.bf16:
            raise UsageError("--fp8-param-gather rounds weights that are in bf16 alone; give --bf16, or leave it out")
    if training.fp8_weight_scale == "sphere":
        if not training.fp8_emulation:
            raise UsageError(
                "--fp8-weight-scale sphere needs --fp8-emulation; TransformerEngine takes no static scales"
            )
        if training.fp8_recipe != "tensorwise":
            raise UsageError(
                f"--fp8-weight-scale sphere gives one scale a matrix, which --fp8-recipe {training.fp8_recipe} has not;"
                " give tensorwise"
            )
        if not config.optimizer.has_spheres:
            raise UsageError(
                f"--fp8-weight-scale sphere needs weights on spheres, which --optimizer {config.optimizer.optimizer}"
                " leaves; give hyperp, muonh or normuonh"
            )


def _check_kernels(training: TrainingConfig) -> None:
    if training.attention_backend == "sdpa" and training.recompute_granularity == "selective":
        raise UsageError(
            "--recompute-granularity selective recomputes what --attention-backend sdpa does not keep;"
            " leave it out, or give full"
        )
    if training.cross_entropy_fusion_impl == "te" and not training.cross_entropy_loss_fusion:
        raise UsageError("--cross-entropy-fusion-impl te needs --cross-entropy-loss-fusion; give it, or leave it out")
    if training.cross_entropy_loss_fusion and training.cross_entropy_fusion_impl == "native" and not training.bf16:
        raise UsageError(
            "--cross-entropy-loss-fusion rounds gradients to bf16 with --cross-entropy-fusion-impl native; give --bf16,"
            " or te, or leave it out"
        )
    if training.cross_entropy_loss_fusion and training.deterministic_mode:
        raise UsageError(
            "--cross-entropy-loss-fusion is not deterministic, says Megatron-LM; leave it out, or --deterministic-mode"
        )
    if training.gradient_accumulation_fusion and training.fp8_emulation:
        raise UsageError(
            "--gradient-accumulation-fusion adds to the weight of a product, which --fp8-emulation replaces by a"
            " rounded copy; leave one out"
        )


def _check_fp8_layers(config: Config) -> None:
    """Refuse what TransformerEngine's FP8 cannot do, wherever it runs."""
    training, model, parallel, moe = config.training, config.model, config.parallel, config.moe
    if training.transformer_impl == "local":
        raise UsageError("--transformer-impl local has no FP8 but in emulation; leave it out, or give --fp8-emulation")
    if training.fp8_recipe == "rowwise":
        raise UsageError("--fp8-recipe rowwise needs --fp8-emulation; TransformerEngine has no such recipe")
    start, end = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    if training.fp8_recipe == "delayed" and (start or end):
        raise UsageError(
            "--fp8-recipe delayed takes every layer to FP8 or none; leave out --num-layers-at-start-in-bf16 and"
            " --num-layers-at-end-in-bf16, or give --fp8-recipe tensorwise"
        )
    per_stage = model.num_layers // parallel.pipeline_model_parallel_size
    if max(start, end) > per_stage:
        raise UsageError(
            f"--num-layers-at-start-in-bf16 {start} and --num-layers-at-end-in-bf16 {end} can each be {per_stage} at"
            " most, the layers of a pipeline stage; lower them"
        )
    tp, multiple = parallel.tensor_model_parallel_size, _FP8_MULTIPLES[training.fp8_recipe]
    queries, keys = model.num_attention_heads // tp, model.num_query_groups // tp
    tokens = training.micro_batch_size * model.seq_length
    sizes = {
        "--hidden-size": model.hidden_size,
        "--num-attention-heads x --kv-channels of a rank": queries * model.kv_channels,
        "(--num-attention-heads + 2 x --num-query-groups) x --kv-channels of a rank": (queries + 2 * keys)
        * model.kv_channels,
        "--micro-batch-size x --seq-length of a rank": tokens // (tp if parallel.sequence_parallel else 1),
    }
    if moe.num_experts:
        sizes["--moe-ffn-hidden-size of a rank"] = moe.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
        sizes["--moe-shared-expert-intermediate-size of a rank"] = moe.moe_shared_expert_intermediate_size // tp
    else:
        sizes["--ffn-hidden-size of a rank"] = model.ffn_hidden_size // tp
    for what, size in sizes.items():
        if size % multiple:
            raise UsageError(
                f"{what} is {size}, but --fp8-recipe {training.fp8_recipe} needs multiples of {multiple}; the nearest:"
                f" {multiples(size, multiple)}"
            )


def _check_delayed_scaling(training: TrainingConfig) -> None:
    length, algo, margin = training.fp8_amax_history_len, training.fp8_amax_compute_algo, training.fp8_margin
    if training.fp8_format == "none" or training.fp8_recipe != "delayed":
        for flag, given in (
            ("--fp8-amax-history-len", length > 1),
            ("--fp8-amax-compute-algo max", algo == "max"),
            ("--fp8-margin", margin),
        ):
            if given:
                raise UsageError(f"{flag} needs --fp8-format and --fp8-recipe delayed; give both, or leave it out")
    if length > 1 and algo != "max":
        raise UsageError(
            f"--fp8-amax-history-len {length} keeps steps that --fp8-amax-compute-algo {algo} does not look at;"
            " give max, or leave the length out"
        )
    if length == 1 and algo == "max":
        raise UsageError(
            "--fp8-amax-compute-algo max needs --fp8-amax-history-len above 1; give a length, 1024 say, or leave it out"
        )
