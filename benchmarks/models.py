"""Small models on which the cost of something beside a step is measured."""

from __future__ import annotations

from pathlib import Path

from megatron_hyperp.config import Config, DataConfig, LoggingConfig, ModelConfig, MoEConfig, TrainingConfig

VOCABULARY = 2048
# Depth, width, sequence length, sequences of a micro-batch, experts.
MODELS = {
    "dense": (4, 128, 256, 2, 0),
    "wide": (4, 512, 256, 2, 0),
    "experts": (4, 128, 256, 2, 8),
}


def config_of(name: str, folder: Path, prefix: str, *, micro_batches: int) -> Config:
    """Return a model's config, not yet resolved, without evaluations and reports.

    Args:
        name: of ``MODELS``.
        folder: of the run.
        prefix: of a corpus of ``VOCABULARY`` tokens.
        micro_batches: of a global batch, those of all ranks.
    """
    depth, width, length, size, experts = MODELS[name]
    config = Config(
        model=ModelConfig(depth=depth, aspect_ratio=width // depth, seq_length=length),
        data=DataConfig(data_path=[prefix], tokenizer_model=f"null:{VOCABULARY}"),
        training=TrainingConfig(
            micro_batch_size=size, global_batch_size=micro_batches * size, train_iters=1000, eval_interval=0
        ),
        logging=LoggingConfig(run_dir=str(folder), log_interval=1000, stability_interval=0, quiet=True),
    )
    if experts:
        config.moe = MoEConfig(num_experts=experts, moe_router_topk=2, moe_ffn_hidden_size=width)
    return config
