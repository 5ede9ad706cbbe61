"""NVIDIA's own trainer, ``megatron.training`` of Megatron-Core 0.19, on CPU and gloo.

Its flags are those of Megatron-LM's pretrain_gpt.py, which is not in the wheel: what that does with a GPT is here,
through the wheel's own model builder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from megatron_hyperp import device


def run_on_cpu() -> None:
    """Replace what the trainer asks of CUDA; the model itself runs by :func:`device.adapt_megatron`."""
    device.adapt_megatron()
    cuda: Any = torch.cuda
    properties = SimpleNamespace(total_memory=1 << 34, name="cpu", multi_processor_count=1, major=9, minor=0)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "memory_stats": {"allocated_bytes.all.current": 0, "reserved_bytes.all.current": 0},
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, _answering(answer))
    # A build of torch for CUDA, once it believes in a device, asks it whether a graph is being captured.
    optimizer: Any = torch.optim.Optimizer
    optimizer._accelerator_graph_capture_health_check = _answering(None)
    loader: Any = torch.utils.data.DataLoader
    initialize = loader.__init__
    loader.__init__ = lambda self, *words, **named: initialize(self, *words, **named | {"pin_memory": False})
    # The wheel has the helpers of datasets compiled, and no Makefile; fused functions are warmed up on the GPU.
    importlib.import_module("megatron.core.datasets.utils").compile_helpers = _answering(None)  # type: ignore[attr-defined]
    importlib.import_module("megatron.training.training").set_jit_fusion_options = _answering(None)  # type: ignore[attr-defined]


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
    """Build the datasets of training, validation and test: samples of ``--train-data-path`` and so on."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False) -> Any:
    """Return the losses [batch, sequence] of a batch's tokens, and the function that sums them."""
    batch = next(batches)
    length = batch["tokens"].shape[1]
    later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    losses = model(batch["tokens"], batch["position_ids"], later, labels=batch["labels"])
    return losses, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    loss, tokens = (losses.float() * mask.float()).sum(), mask.sum().detach().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach().clone(), tokens.float()])}


def main() -> None:
    """Train, or with ``--skip-train`` evaluate, as the command line says."""
    run_on_cpu()
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    parse_and_validate_args(args_defaults={})
    model = gpt_config_from_args(get_args())
    container = pretrain_cfg_container_from_args(get_args(), model)
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
