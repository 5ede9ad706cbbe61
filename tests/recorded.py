"""Losses and gradient norms of short trainings, as recorded under one version of Megatron-Core.

``python -m tests.recorded`` writes the record again. Bits are those of one kind of processor and one version of torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "recorded_losses.json"
COMMON = {
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "seq_length": 32, "train_iters": 10},
    **{"micro_batch_size": 4, "global_batch_size": 16, "quiet": True},
}
TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
FP8 = {"fp8_format": "hybrid", "fp8_emulation": True}
MOE = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, SP),
    "pp2": (2, PP2),
    "vpp2": (2, {**PP2, "num_layers": 4, "num_virtual_stages_per_pipeline_rank": 2}),
    "dp2": (2, {}),
    "one-adamw": (1, {"optimizer": "adamw", "lr": 0.005, "base_hidden_size": 32}),
    "one-bf16": (1, {"bf16": True}),
    "one-fp8": (1, FP8),
    "one-fp8-delayed": (1, {**FP8, "fp8_recipe": "delayed"}),
    "one-full-recompute": (1, {"recompute_granularity": "full"}),
    "one-selective-recompute": (1, {"recompute_granularity": "selective", "attention_backend": "local"}),
    "one-tied": (1, {"untie_embeddings_and_output_weights": False}),
    "one-multi-head": (1, {"num_query_groups": 4}),
    "experts": (1, MOE),
    "experts-ep2": (2, {**MOE, **EP2}),
    "experts-ep2-allgather": (2, {**MOE, **EP2, "moe_token_dispatcher_type": "allgather"}),
    "experts-tp2-sp": (2, {**MOE, **SP}),
    "experts-aux-loss": (1, {**MOE, "moe_router_load_balancing_type": "aux_loss"}),
    "experts-seq-aux-loss": (1, {**MOE, "moe_router_load_balancing_type": "seq_aux_loss"}),
    "experts-global-aux-loss": (1, {**MOE, "moe_router_load_balancing_type": "global_aux_loss"}),
    "experts-z-loss": (1, {**MOE, "moe_z_loss_coeff": 1e-3}),
    "experts-no-balance": (1, {**MOE, "moe_router_load_balancing_type": "none"}),
    "experts-capacity": (1, {**MOE, "moe_expert_capacity_factor": 1.0}),
    "experts-fp8": (1, {**MOE, **FP8}),
}
COLUMNS = ("loss", "grad_norm", "radius_drift", "balance_loss", "tokens_per_expert")


def machine() -> dict[str, str]:
    """What decides about bits besides Megatron-Core: torch, and the model and instructions of this processor."""
    import torch

    described = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    lines = [line for line in described if line.split("\t")[0] in ("vendor_id", "cpu family", "model", "flags")]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return {"torch": torch.__version__.split("+")[0], "processor": digest}


def train(name: str, corpus: str, folder: Path) -> dict[str, list[Any]]:
    """Train a case on new ranks; return the columns of its metrics that a version must not change."""
    from tests.toy import rows_of_run

    ranks, fields = CASES[name]
    rows = rows_of_run(ranks, corpus, folder, **{**COMMON, **fields})
    return {column: [row[column] for row in rows] for column in COLUMNS if column in rows[0]}


def main() -> None:
    """Write the record."""
    from importlib import metadata

    from tests.toy import write_corpus

    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name))
        cases = {case: train(case, corpus, Path(name) / case) for case in CASES}
    recorded = {"megatron-core": metadata.version("megatron-core"), **machine(), "cases": cases}
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    output.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(cases)} trainings recorded in {output}")


if __name__ == "__main__":
    main()
