"""Complete and check a config: what follows from other fields, and what cannot run together.

All of it happens before any process group exists, and alike on every rank.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from megatron_hyperp import estimate, learning_rates, precision, transfer
from megatron_hyperp.config import (
    RANGES,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    TrainingConfig,
    data_parallel_size,
    flag_name,
    width_multiplier,
)
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import not_local
from megatron_hyperp.text import divisors, multiples


def resolve(config: Config, world_size: int, tokenizer_vocab_size: int | None) -> Config:
    """Return a complete, checked copy; see :meth:`megatron_hyperp.config.Config.resolve`."""
    config = copy.deepcopy(config)
    try:
        check_ranges(config)
        check_paths(config)
        _check_data(config.data)
        _resolve_architecture(config.model, tokenizer_vocab_size, config.parallel.tensor_model_parallel_size)
        _resolve_experts(config.model, config.moe)
        _check_parallelism(config, world_size)
        _resolve_duration(config)
        _resolve_scaling(config)
        _resolve_schedule(config)
        _resolve_newton_schulz(config)
        _check_rules(config)
        _check_radius(config)
        learning_rates.check(config)
        precision.check(config)
        # What was derived is what was given too.
        check_ranges(config)
    except UsageError as error:
        error.same_on_all_ranks = True
        raise
    except ArithmeticError as error:
        raise UsageError(
            f"the sizes, tokens and learning rates given make numbers that no computer holds ({error}); look for one"
            " that is off by powers of ten",
            same_on_all_ranks=True,
        ) from error
    return config


def check_ranges(config: Config) -> None:
    """See that every number of a config is finite and in its range.

    Raises:
        UsageError: one is not.
    """
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            value = getattr(values, item.name)
            if value is None or isinstance(value, (bool, str, list)):
                continue
            flag = flag_name(item.name)
            allowed = item.metadata["allowed"]
            if not -math.inf < value < math.inf:
                raise UsageError(f"{flag} is {value}; it must be a finite number {allowed}")
            if not RANGES[allowed](value):
                hint = ", or left out to be derived" if value == 0 and "derived" in item.metadata else ""
                raise UsageError(f"{flag} is {value:g}; it must be {allowed}{hint}")


# Fields that name files and folders.
PATHS = {
    "data": ("data_path", "tokenizer_model", "data_cache_path"),
    "checkpoint": ("save", "load", "pretrained_checkpoint"),
    "logging": ("run_dir", "tensorboard_dir"),
}


def check_paths(config: Config) -> None:
    """See that files and folders are on this machine.

    Raises:
        UsageError: one is the address of an object store.
    """
    for section, names in PATHS.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            for path in value if isinstance(value, list) else [value or ""]:
                if fault := not_local(path):
                    raise UsageError(f"{flag_name(name)} {fault}")


def _check_data(data: DataConfig) -> None:
    if data.mock_data and data.data_path:
        raise UsageError(
            f"--mock-data trains without a corpus, but --data-path is {' '.join(data.data_path)}; leave one of them out"
        )


def _fill(section: Any, **values: int) -> None:
    """Set those of the fields that are still None."""
    for name, value in values.items():
        if getattr(section, name) is None:
            setattr(section, name, value)


def _fill_from_depth(model: ModelConfig, depth: int) -> None:
    """Set the sizes that are still None to the paper's."""
    _fill(model, num_layers=depth, hidden_size=model.aspect_ratio * depth, num_attention_heads=2 * depth)
    _fill(model, kv_channels=model.aspect_ratio, num_query_groups=math.gcd(4, model.num_attention_heads))
    _fill(model, ffn_hidden_size=4 * model.hidden_size)


def _resolve_architecture(model: ModelConfig, tokenizer_vocab_size: int | None, tensor_ranks: int) -> None:
    if model.depth is not None:
        _fill_from_depth(model, model.depth)
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(model, name) is None:
            raise UsageError(f"the architecture lacks {flag_name(name)}; give it, or --depth for the paper's shape")
    heads = model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads:
        raise UsageError(
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {heads};"
            f" the nearest that are: {multiples(model.hidden_size, heads)} (or give --kv-channels)"
        )
    _fill(model, ffn_hidden_size=4 * model.hidden_size, kv_channels=model.hidden_size // heads, num_query_groups=heads)
    if heads % model.num_query_groups:
        raise UsageError(
            f"--num-query-groups {model.num_query_groups} does not divide --num-attention-heads {heads};"
            f" those that do: {divisors(heads)}"
        )
    if model.kv_channels % 2:
        raise UsageError(
            f"--kv-channels is {model.kv_channels}, but rotary embeddings need an even head size,"
            f" {model.kv_channels + 1}, say"
        )
    _resolve_vocabulary(model, tokenizer_vocab_size, tensor_ranks)
    if model.positions < model.seq_length:
        raise UsageError(
            f"--max-position-embeddings {model.max_position_embeddings} is less than --seq-length {model.seq_length};"
            " raise it, or leave it out"
        )
    if model.embedding_init_std is None:
        model.embedding_init_std = 1e-4 if model.untie_embeddings_and_output_weights else 0.02
    if model.softmax_scale is None:
        model.softmax_scale = transfer.softmax_scale(model.kv_channels)


def _resolve_experts(model: ModelConfig, moe: MoEConfig) -> None:
    """Derive Megatron's sizes from sparsity and top-k: S K experts of FFN size / K, of which one may be shared."""
    sparsity, topk, shared = moe.moe_sparsity, moe.moe_topk, int(moe.moe_shared_expert)
    if (sparsity is None) != (topk is None):
        given, missing = ("--moe-sparsity", "--moe-topk") if topk is None else ("--moe-topk", "--moe-sparsity")
        raise UsageError(f"{given} needs {missing} beside it: together they make S x K experts")
    if sparsity is not None and topk is not None:
        if moe.num_experts == 0:
            raise UsageError(
                f"--num-experts 0 makes a dense model, but --moe-sparsity {sparsity} and --moe-topk {topk} make"
                " experts; leave the first out, or the other two"
            )
        if topk == 1 and shared:
            raise UsageError(
                "--moe-shared-expert leaves none of --moe-topk 1 to route; give 2 or more, or leave it out"
            )
        if model.ffn_hidden_size % topk:
            raise UsageError(
                f"--moe-topk {topk} does not divide the FFN size {model.ffn_hidden_size} into experts;"
                f" the nearest --ffn-hidden-size: {multiples(model.ffn_hidden_size, topk)}"
            )
        _fill(moe, num_experts=sparsity * topk - shared, moe_router_topk=topk - shared)
        _fill(moe, moe_ffn_hidden_size=model.ffn_hidden_size // topk)
    if not moe.num_experts:
        _check_dense(moe)
        fill_dense(moe)
        return
    _fill(moe, moe_router_topk=min(2, moe.num_experts), moe_ffn_hidden_size=model.ffn_hidden_size)
    if shared:
        _fill(moe, moe_shared_expert_intermediate_size=moe.moe_ffn_hidden_size)
    needed = ["moe_router_topk", "moe_ffn_hidden_size", *(["moe_shared_expert_intermediate_size"] if shared else [])]
    for name in needed:
        if not getattr(moe, name):
            raise UsageError(f"{flag_name(name)} is 0, but the model has experts; give 1 or more, or leave it out")
    _fill(moe, moe_shared_expert_intermediate_size=0)
    if moe.moe_router_topk > moe.num_experts:
        raise UsageError(
            f"--moe-router-topk {moe.moe_router_topk} is more than the {moe.num_experts} routed experts;"
            f" give {moe.num_experts} at most"
        )
    if moe.moe_balance_statistics == "exact" and not (
        moe.moe_router_load_balancing_type == "global" and moe.moe_aux_loss_coeff
    ):
        raise UsageError(
            "--moe-balance-statistics exact needs the global loss, but --moe-router-load-balancing-type is"
            f" {moe.moe_router_load_balancing_type} and --moe-aux-loss-coeff {moe.moe_aux_loss_coeff:g}; leave it out,"
            " or give global and a weight above 0"
        )


def fill_dense(moe: MoEConfig) -> None:
    """Set the sizes of experts that are still None to 0, those of a dense model."""
    _fill(moe, num_experts=0, moe_router_topk=0, moe_ffn_hidden_size=0, moe_shared_expert_intermediate_size=0)


def _check_dense(moe: MoEConfig) -> None:
    """Refuse what would have no effect without experts."""
    names = (
        "moe_shared_expert",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_z_loss_coeff",
        "moe_expert_capacity_factor",
    )
    given = [flag_name(name) for name in names if getattr(moe, name)]
    if moe.moe_balance_statistics == "exact":
        given.append("--moe-balance-statistics exact")
    if given:
        raise UsageError(
            f"{given[0]} needs experts; give --num-experts, or --moe-sparsity and --moe-topk, or leave it out"
        )


def _check_expert_parallelism(config: Config, world_size: int) -> None:
    moe, parallel = config.moe, config.parallel
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if not moe.num_experts:
        for flag, size in (("--expert-model-parallel-size", ep), ("--expert-tensor-parallel-size", etp)):
            if size > 1:
                raise UsageError(f"{flag} {size} needs experts; leave it out, or give --num-experts")
        return
    if tp > 1 and not parallel.sequence_parallel:
        raise UsageError(f"experts under --tensor-model-parallel-size {tp} need --sequence-parallel; give it")
    if moe.num_experts % ep:
        raise UsageError(
            f"--expert-model-parallel-size {ep} does not divide the {moe.num_experts} routed experts;"
            f" those that do: {divisors(moe.num_experts)}; the nearest --num-experts that it divides:"
            f" {multiples(moe.num_experts, ep)}"
        )
    if etp not in (1, tp):
        raise UsageError(
            f"--expert-tensor-parallel-size is {etp}; it must be 1, or --tensor-model-parallel-size, which is {tp}"
        )
    if moe.moe_ffn_hidden_size % etp:
        raise UsageError(
            f"--expert-tensor-parallel-size {etp} does not divide --moe-ffn-hidden-size {moe.moe_ffn_hidden_size};"
            f" the nearest: {multiples(moe.moe_ffn_hidden_size, etp)}"
        )
    # Rows of 16 bytes, for grouped products.
    multiple = 8 if config.training.bf16 else 4
    for flag, size in (
        ("--hidden-size", config.model.hidden_size),
        ("--moe-ffn-hidden-size / --expert-tensor-parallel-size", moe.moe_ffn_hidden_size // etp),
    ):
        if size % multiple:
            raise UsageError(
                f"{flag} is {size}; experts are multiplied in groups, which needs a multiple of {multiple};"
                f" the nearest: {multiples(size, multiple)}"
            )
    if world_size % (ep * etp * pp):
        raise UsageError(
            f"{world_size} rank(s) cannot hold expert x expert-tensor x pipeline parallelism {ep} x {etp} x {pp};"
            f" start a multiple of {ep * etp * pp} ranks, or lower --expert-model-parallel-size"
        )
    if moe.moe_shared_expert_intermediate_size % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp} does not divide --moe-shared-expert-intermediate-size"
            f" {moe.moe_shared_expert_intermediate_size}; the nearest:"
            f" {multiples(moe.moe_shared_expert_intermediate_size, tp)}"
        )


def padded_vocabulary(tokens: int, multiple: int, tensor_ranks: int) -> int:
    """Return the rows of an embedding: its tokens, padded to a multiple.

    Megatron-LM pads to the multiple times the tensor-parallel ranks. Here that is done only if the ranks would not
    divide the rows otherwise, so that the model does not depend on the layout.
    """
    rows = math.ceil(tokens / multiple) * multiple
    if rows % tensor_ranks:
        rows = math.ceil(tokens / (multiple * tensor_ranks)) * multiple * tensor_ranks
    return rows


def _resolve_vocabulary(model: ModelConfig, tokenizer_vocab_size: int | None, tensor_ranks: int) -> None:
    # An imported model may have rows of its own beyond the tokenizer's ids: its exports keep them.
    known = max(model.unpadded_vocab_size or 0, tokenizer_vocab_size or 0)
    if model.vocab_size is None:
        if tokenizer_vocab_size is None:
            raise UsageError("the size of the vocabulary is not known; give --tokenizer-model or --vocab-size")
        model.vocab_size = padded_vocabulary(known, model.make_vocab_size_divisible_by, tensor_ranks)
    elif tokenizer_vocab_size is not None and tokenizer_vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer knows {tokenizer_vocab_size} tokens, more than --vocab-size {model.vocab_size};"
            " raise it, or leave it out to take the tokenizer's"
        )
    if known > model.vocab_size:
        raise UsageError(
            f"--unpadded-vocab-size {model.unpadded_vocab_size} is more than --vocab-size {model.vocab_size}; lower it,"
            " or leave it out to take the tokenizer's"
        )
    if tokenizer_vocab_size is not None:
        model.unpadded_vocab_size = known


def _check_parallelism(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise UsageError(
            f"{world_size} rank(s) cannot hold tensor x pipeline parallelism {tp} x {pp} = {tp * pp}; start a"
            f" multiple of {tp * pp} ranks, or lower --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
    split_by_tp = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    for name in split_by_tp:
        if getattr(model, name) % tp:
            fitting = math.gcd(*(getattr(model, name) for name in split_by_tp))
            raise UsageError(
                f"--tensor-model-parallel-size {tp} does not divide {flag_name(name)} {getattr(model, name)};"
                f" sizes that fit this model: {divisors(fitting)}"
            )
    if parallel.sequence_parallel and tp == 1:
        raise UsageError("--sequence-parallel needs --tensor-model-parallel-size above 1; leave it out, or raise that")
    if parallel.sequence_parallel and model.seq_length % tp:
        raise UsageError(
            f"--sequence-parallel needs a --seq-length that --tensor-model-parallel-size {tp} divides,"
            f" not {model.seq_length}; the nearest: {multiples(model.seq_length, tp)}"
        )
    _check_expert_parallelism(config, world_size)
    _check_pipeline(config)
    _check_batch(config, world_size)


def _check_pipeline(config: Config) -> None:
    model, parallel = config.model, config.parallel
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and pp == 1:
        raise UsageError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} needs --pipeline-model-parallel-size above 1;"
            " leave it out, or raise that"
        )
    if model.num_layers % (pp * virtual):
        flag = "--depth" if model.depth == model.num_layers else "--num-layers"
        raise UsageError(
            f"{flag} {model.num_layers} is not divisible by --pipeline-model-parallel-size x"
            f" --num-virtual-stages-per-pipeline-rank = {pp * virtual}; the nearest that are:"
            f" {multiples(model.num_layers, pp * virtual)}"
        )
    if config.training.recompute_granularity == "full":
        _check_recompute(config.training, layers=model.num_layers // (pp * virtual))


def _check_recompute(training: TrainingConfig, layers: int) -> None:
    """Megatron-Core would run past the end of a pipeline chunk of so many layers."""
    number = training.recompute_num_layers
    if training.recompute_method == "uniform" and layers % number:
        raise UsageError(
            f"--recompute-num-layers {number} does not divide the {layers} layers of a pipeline chunk;"
            f" those that do: {divisors(layers)}"
        )
    if number > layers:
        raise UsageError(
            f"--recompute-num-layers {number} is more than the layers of a pipeline chunk; give {layers} at most"
        )


def _check_batch(config: Config, world_size: int) -> None:
    training, parallel = config.training, config.parallel
    _fill(training, global_batch_size=max(1, config.transfer.base_batch_tokens // config.model.seq_length))
    size, share = training.global_batch_size, training.micro_batch_size * data_parallel_size(config, world_size)
    if size % share:
        raise UsageError(
            f"--global-batch-size {size} is not divisible by --micro-batch-size x data-parallel ranks = {share};"
            f" the nearest that are: {multiples(size, share)}"
        )
    micro_batches, pp = size // share, parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and micro_batches % pp:
        raise UsageError(
            f"--global-batch-size {size} makes {micro_batches} micro-batches, a number that the interleaved schedule"
            f" needs --pipeline-model-parallel-size {pp} to divide; the nearest: {multiples(size, share * pp)}"
        )


def _resolve_duration(config: Config) -> None:
    training, batch = config.training, config.batch_tokens
    if training.train_tokens is not None:
        iterations = math.ceil(training.train_tokens / batch)
        _fill(training, train_iters=iterations)
        if training.train_iters != iterations:
            raise UsageError(
                f"--train-iters {training.train_iters} and --train-tokens {training.train_tokens:g} contradict each"
                f" other: at {batch} tokens per batch the tokens take {iterations} iterations; give one, and none"
                " for the other if a file sets it"
            )
    elif training.train_iters is not None:
        training.train_tokens = float(training.train_iters * batch)
    else:
        training.train_tokens = float(_token_budget(config))
        training.train_iters = math.ceil(training.train_tokens / batch)


def _token_budget(config: Config) -> int:
    """T(d), the base model being the one that --depth makes of the base depth."""
    model = config.model
    if model.depth is None:
        raise UsageError("how long to train is not known; give --train-iters or --train-tokens (--depth derives them)")
    base = ModelConfig(
        aspect_ratio=model.aspect_ratio,
        vocab_size=model.vocab_size,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
    )
    _fill_from_depth(base, config.transfer.base_depth)
    # Without the router, a mixture of experts has the active parameters, and so the budget, of its dense model.
    parameters, base_parameters = estimate.parameter_count(model), estimate.parameter_count(base)
    return transfer.token_budget(parameters, base_parameters, config.transfer.base_tokens)


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


def _resolve_schedule(config: Config) -> None:
    optimizer, iterations, peak = config.optimizer, config.training.train_iters, config.learning_rate().value
    if not 0 < peak < math.inf:
        raise UsageError(f"the learning rate follows to be {peak:g}; give --lr, or look at what it follows from")
    if optimizer.min_lr is None:
        optimizer.min_lr = 0.1 * peak
    if optimizer.min_lr > peak:
        raise UsageError(f"--min-lr {optimizer.min_lr:g} is above the peak learning rate {peak:g}; lower it")
    after_warmup = iterations - optimizer.lr_warmup_iters
    if after_warmup < 1:
        raise UsageError(
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves none of the {iterations} iterations;"
            f" give {iterations - 1} at most"
        )
    if optimizer.lr_wsd_decay_iters is None:
        optimizer.lr_wsd_decay_iters = default_wsd_decay(iterations, optimizer.lr_warmup_iters)
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters > after_warmup:
        raise UsageError(
            f"--lr-wsd-decay-iters {optimizer.lr_wsd_decay_iters} is more than the iterations after warm-up;"
            f" give {after_warmup} at most"
        )


def default_wsd_decay(iterations: int, warmup: int) -> int:
    """Return the iterations over which WSD decays: a fifth of them, or what the warm-up leaves."""
    return min(max(1, iterations // 5), iterations - warmup)


def _resolve_newton_schulz(config: Config) -> None:
    options, moe = config.optimizer, config.moe
    steps = options.steps
    present = ["attention"]
    if not moe.num_experts or moe.moe_shared_expert_intermediate_size:
        present.append("mlp")
    if moe.num_experts:
        present += ["experts", "router"]
    for family, number in steps.by_family.items():
        if family not in present:
            raise UsageError(
                f"--ns-steps {family}={number} is of matrices that this model does not have; it has"
                f" {', '.join(present)}"
            )
    options.ns_steps = steps.text(options.ns_coefficients)
    for flag, value in (("--ns-form", options.ns_form), ("--ns-strategy", options.ns_strategy)):
        if value == "gram" and options.ns_dtype == "bf16":
            raise UsageError(f"{flag} gram loses accuracy with --ns-dtype bf16; give fp16 or fp32, or leave it out")
    if options.ns_form == "standard" and options.ns_strategy == "gram":
        raise UsageError("--ns-strategy gram iterates in Gram form, which --ns-form standard rules out; leave one out")


def _check_rules(config: Config) -> None:
    """See that the rules that are asked for are there, and that each has parameters."""
    options = config.optimizer
    if options.router_rule is not None and not config.moe.num_experts:
        raise UsageError(f"--router-rule {options.router_rule} needs experts; give --num-experts, or leave it out")
    given = [rule for rule in (options.optimizer_rule, options.router_rule) if rule is not None]
    if given:
        # It imports torch, which a command line does without until it trains.
        from megatron_hyperp.optim.rules import rule_class

        for rule in given:
            rule_class(rule)


def _check_radius(config: Config) -> None:
    """Radii from weights are numbers of an import, one for each fused matrix."""
    if config.optimizer.radius == "stateless":
        return
    optimizer = config.optimizer.optimizer
    for flag, given, why in (
        ("--radius-scale", config.optimizer.radius_scale != 1.0, "is a factor on radii from shapes"),
        ("--matrix-split", config.optimizer.matrix_split != "fused", "makes matrices of which none were measured"),
        ("--fp8-weight-scale sphere", config.training.fp8_weight_scale == "sphere", "takes radii from shapes"),
        (f"--optimizer {optimizer}", not config.optimizer.has_spheres, "has no spheres"),
    ):
        if given:
            raise UsageError(f"--radius from-weights: {flag} {why}; leave one of them out")
