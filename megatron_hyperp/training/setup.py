"""What a training is made of: Megatron-Core's process groups, the model's chunks, their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from megatron_hyperp import device
from megatron_hyperp.config import Config

if TYPE_CHECKING:
    from megatron_hyperp.model.delayed import DelayedScales
    from megatron_hyperp.moe.balance import Balance
    from megatron_hyperp.numerics.fp8 import WeightScale
    from megatron_hyperp.optim.data_parallel import DataParallel
    from megatron_hyperp.optim.distributed import HyperPOptimizer


def initialize_megatron(config: Config) -> None:
    """Create Megatron-Core's process groups and random states; torch's process group must exist."""
    from megatron.core import parallel_state, tensor_parallel

    parallel, virtual = config.parallel, config.parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        # Gloo twins of the NCCL groups, for CPU tensors: nothing here sends any.
        create_gloo_process_groups=False,
    )
    torch.manual_seed(config.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)


def build(
    config: Config,
    balance: Balance | None,
    scales: DelayedScales | None = None,
    *,
    radii: Mapping[str, float] | None = None,
    log: Callable[[str], None],
) -> tuple[list[DataParallel], HyperPOptimizer]:
    """Build this rank's pipeline chunks and their optimizer; Megatron's process groups must exist.

    Args:
        config: resolved config.
        balance: load statistics of the experts, or None for a dense model.
        scales: of delayed scaling in emulated FP8, if there are any.
        radii: of spheres that do not follow from shapes, by the parameter's name.
        log: receives what the optimizer has to say of itself.
    """
    from megatron_hyperp.model.build import build_model, transformer_config
    from megatron_hyperp.optim.data_parallel import wrap_for_data_parallelism

    core_config, parallel = transformer_config(config), config.parallel
    chunks = wrap_for_data_parallelism(
        core_config,
        build_model(config, core_config, balance, scales),
        overlap_grad_reduce=device.overlaps(parallel.overlap_grad_reduce),
        overlap_param_gather=device.overlaps(parallel.overlap_param_gather),
    )
    return chunks, optimizer_of(config, chunks, radii=radii, log=log)


def optimizer_of(
    config: Config,
    chunks: Sequence[DataParallel],
    *,
    radii: Mapping[str, float] | None = None,
    log: Callable[[str], None] | None = None,
) -> HyperPOptimizer:
    """Build the optimizer of wrapped chunks for a resolved config; see :func:`build` for the arguments."""
    from megatron_hyperp.model.fp8 import weight_scales
    from megatron_hyperp.optim.building import build_optimizer
    from megatron_hyperp.optimizer_options import heads_of, optimizer_options

    scales: dict[torch.nn.Parameter, WeightScale] = {}
    for chunk in chunks if config.training.fp8_param_gather else ():
        scales |= weight_scales(chunk.module, config)
    return build_optimizer(
        chunks,
        optimizer_options(config, radii),
        exchange=chunks[0].exchange,
        heads=heads_of(config),
        scales=scales,
        bucket_size=config.parallel.ddp_bucket_size,
        log=log,
    )
