"""Build this rank's part of the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperp import device, libraries
from megatron_hyperp.config import Config
from megatron_hyperp.model.delayed import DelayedEmulation, DelayedScales
from megatron_hyperp.model.fp8 import Emulation, Fp8ColumnParallelLinear, Fp8Recipe, Fp8RowParallelLinear, fp8_layers
from megatron_hyperp.model.init import initialize
from megatron_hyperp.model.layer_specs import block_spec
from megatron_hyperp.moe.balance import Balance
from megatron_hyperp.moe.grouped import GroupedLinear
from megatron_hyperp.parameters import mark_expert_parameters


def transformer_config(config: Config) -> TransformerConfig:
    """Translate a resolved config into Megatron-Core's."""
    model, parallel, training = config.model, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    full = training.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        softmax_scale=model.softmax_scale,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # model/init.py sets every weight after construction.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        bf16=training.bf16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        # Batched point-to-point sends pair up wrongly under the interleaved schedule on gloo; Megatron-LM too uses
        # overlapped single sends there.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        # The loss is a mean over the tokens of the whole global batch, however it is cut into micro-batches and ranks.
        calculate_per_token_loss=True,
        recompute_granularity=None if training.recompute_granularity == "none" else training.recompute_granularity,
        recompute_method=training.recompute_method if full else None,
        recompute_num_layers=training.recompute_num_layers if full else None,
        **_expert_settings(config),
        **_fp8_settings(config),
        cross_entropy_loss_fusion=training.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=training.cross_entropy_fusion_impl,
        gradient_accumulation_fusion=libraries.fuses_accumulation(config),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=training.deterministic_mode,
        **device.megatron_settings(virtual),
    )


def _expert_settings(config: Config) -> dict[str, Any]:
    """Megatron-Core's settings for a mixture of experts; none for a dense model."""
    moe, parallel = config.moe, config.parallel
    if not moe.num_experts:
        return {}
    # Our global loss lives in the router, so Megatron-Core is told of none.
    own = moe.moe_router_load_balancing_type in ("global", "none")
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.moe_router_topk,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or None,
        "moe_router_load_balancing_type": "none" if own else moe.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": 0.0 if own else moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": libraries.implementation(config)[0] == "transformer_engine",
        # Megatron-Core insists for one expert per token; our router has its own gates.
        "moe_router_pre_softmax": moe.moe_router_topk == 1,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def _fp8_settings(config: Config) -> dict[str, Any]:
    """Megatron-Core's settings for TransformerEngine's FP8; none without it, or where it is emulated."""
    training = config.training
    if training.fp8_format == "none" or training.fp8_emulation:
        return {}
    start, end = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    return {
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8_recipe,
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
        "fp8_margin": training.fp8_margin,
        "fp8_amax_history_len": training.fp8_amax_history_len,
        "fp8_amax_compute_algo": training.fp8_amax_compute_algo,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_balance(config: Config) -> Balance | None:
    """Return the load statistics that all routers share, or None for a dense model."""
    moe = config.moe
    if not moe.num_experts:
        return None
    coefficient = moe.moe_aux_loss_coeff if moe.moe_router_load_balancing_type == "global" else 0.0
    return Balance(config.model.num_layers, moe.num_experts, coefficient)


def build_model(
    config: Config,
    core_config: TransformerConfig,
    balance: Balance | None = None,
    scales: DelayedScales | None = None,
) -> list[torch.nn.Module]:
    """Build and initialize the pipeline chunks that this rank holds; Megatron's process groups must exist.

    Args:
        config: resolved config.
        core_config: the same, for Megatron-Core.
        balance: of :func:`build_balance`.
        scales: of :func:`megatron_hyperp.model.delayed.build_scales`.
    """
    virtual = config.parallel.num_virtual_stages_per_pipeline_rank
    chunks: list[torch.nn.Module] = []
    for index in range(virtual):
        vp_stage = index if virtual > 1 else None
        module: torch.nn.Module = _build_chunk(config, core_config, vp_stage, balance).to(device.device())
        mark_expert_parameters(module, config.parallel.expert_tensor_parallel_size)
        if device.device().type != "meta":
            initialize(module, config)
        if config.training.fp8_emulation:
            emulate_fp8(module, config, scales)
        if config.training.bf16:
            module = Float16Module(core_config, module)
        chunks.append(module)
    return chunks


def emulate_fp8(chunk: torch.nn.Module, config: Config, scales: DelayedScales | None) -> None:
    """Let the linear layers of a chunk's transformer layers round to FP8, but for the first and last layers."""
    training = config.training
    assert (scales is not None) == (training.fp8_recipe == "delayed")
    recipe = Fp8Recipe(
        gradients="e5m2" if training.fp8_format == "hybrid" else "e4m3",
        scaling="tensorwise" if training.fp8_recipe == "delayed" else training.fp8_recipe,
        static_weights=training.fp8_weight_scale == "sphere",
        radius_scale=config.optimizer.radius_scale,
    )
    for layer in fp8_layers(chunk, config):
        _emulate_in_layer(layer, recipe, scales)


def _emulate_in_layer(layer: Any, recipe: Fp8Recipe, scales: DelayedScales | None) -> None:
    tensor = parallel_state.get_tensor_model_parallel_group()
    expert_tensor = parallel_state.get_expert_tensor_parallel_group()
    experts = parallel_state.get_expert_model_parallel_group()
    # Number in the layer of the next matrix, experts of other ranks counted.
    number = 0
    for module in layer.modules():
        if isinstance(module, GroupedLinear):
            group, first = expert_tensor, number + experts.rank() * module.num_gemms
            number += experts.size() * module.num_gemms
        elif isinstance(module, (Fp8ColumnParallelLinear, Fp8RowParallelLinear)):
            group, first = tensor, number
            number += 1
        else:
            continue
        module.fp8 = (
            Emulation(recipe, group)
            if scales is None
            else DelayedEmulation(recipe, group, scales, layer.layer_number - 1, first, module)
        )


def _build_chunk(
    config: Config, core_config: TransformerConfig, vp_stage: int | None, balance: Balance | None
) -> GPTModel:
    model = config.model
    assert model.residual_multiplier is not None
    assert model.logits_multiplier is not None
    chunk = GPTModel(
        config=core_config,
        transformer_layer_spec=block_spec(
            core_config,
            implementation=libraries.implementation(config)[0],
            residual_multiplier=model.residual_multiplier,
            vp_stage=vp_stage,
            gate=config.moe.moe_gate,
            balance=balance,
            emulates_fp8=config.training.fp8_emulation,
            attention=libraries.attention(config),
        ),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    if chunk.post_process and model.logits_multiplier != 1.0:
        chunk.output_layer.register_forward_pre_hook(_scale_input(model.logits_multiplier))
    return chunk


def _scale_input(multiplier: float) -> Any:
    """Scale the output layer's input: the same as scaling its logits, and smaller."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * multiplier, *inputs[1:])

    return hook
