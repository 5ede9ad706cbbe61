"""Any rank of a job of any size, built on one machine: torch's meta device for memory, process groups that are fake.

Model, buckets and optimizer are built by the code that builds them for a training; their tensors have shapes alone,
and collectives return at once. So the layout, who owns what, and the bytes of a rank are the job's own, not an
estimate; activations, traffic and time, which only a training has, are planned.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_hyperp import device
from megatron_hyperp.config import Config, micro_batches
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.hardware import GIB
from megatron_hyperp.megatron_compat.fake_ranks import init_fake_process_group
from megatron_hyperp.planning.activations import activation_bytes
from megatron_hyperp.planning.layouts import Cluster, evaluate
from megatron_hyperp.planning.memory import Memory
from megatron_hyperp.planning.plan import RunPlan, cost_lines, memory_table, run_lines, with_vocabulary
from megatron_hyperp.text import aligned
from megatron_hyperp.training.preflight import check_reports
from megatron_hyperp.training.setup import build, initialize_megatron


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """What a rank holds, built.

    Attributes:
        rank: within the job.
        coordinates: rank and size of each of its process groups, by what they share.
        shapes: of its parameters, by name in the whole model.
        memory: of its tensors; activations and the step's needs are planned.
        ownership: rows of a table, the first its head.
        report: what the optimizer says at the start of a training.
    """

    rank: int
    coordinates: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]
    memory: Memory
    ownership: list[tuple[str, ...]]
    report: list[str]

    @property
    def parameters(self) -> int:
        """How many numbers the parameters are."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def dry_run(config: Config, cluster: Cluster, *, rank: int | None, log: Callable[[str], None]) -> None:
    """Check a config for a job on all GPUs of a cluster, build a rank of it, and say what it needs.

    Args:
        config: not resolved; without a vocabulary or tokenizer it gets the paper's vocabulary.
        cluster: what the job is to run on, one rank for each GPU.
        rank: to build; None for the first, and that of the last pipeline stage.
        log: receives the report.

    Raises:
        UsageError: the config cannot run on so many ranks, or a rank does not fit, which is told after the report.
    """
    gpus = cluster.gpus
    asked, tokens = config, None
    if config.data.tokenizer_model:
        tokens = load_tokenizer(config.data.tokenizer_model).vocab_size
    else:
        asked = with_vocabulary(config)
    resolved = asked.resolve(world_size=gpus, tokenizer_vocab_size=tokens)
    check_reports(resolved, gpus, resolved.training.train_iters)
    with device.planning_for("cuda"):
        layout = evaluate(resolved, cluster)
    plan = RunPlan(resolved, config, cluster, [layout], [])
    log("\n".join([*run_lines(plan), f"layout         {layout.describe()}: divides", "", *cost_lines(layout)]))
    stages = resolved.parallel.pipeline_model_parallel_size
    ranks = [rank] if rank is not None else [0, gpus - 1] if stages > 1 else [0]
    most = 0.0
    for number in ranks:
        built = build_rank(resolved, gpus, number)
        memories = {f"rank {number}, built": built.memory, "fullest rank, planned": layout.memory}
        need = max(memory.total for memory in memories.values())
        most, verdict = max(most, need), "fits" if need <= cluster.usable else "DOES NOT FIT"
        lines = ["", *_position_lines(built, cluster), "", *memory_table(memories)]
        lines += [f"  {need / GIB:.1f} GiB {verdict} into {cluster.usable / GIB:.1f} GiB", ""]
        lines += ["\n\n".join(built.report), "", *aligned(built.ownership, right=lambda column: column > 0)]
        log("\n".join(lines))
    if most > cluster.usable:
        raise UsageError(
            f"a rank needs {most / GIB:.1f} GiB, and may use {cluster.usable / GIB:.1f} GiB of its {cluster.gpu.name};"
            f" take a layout from tools/plan_run.py --gpus {gpus}, or more GPUs"
        )


@contextlib.contextmanager
def as_rank(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Be a rank of a job, within :func:`megatron_hyperp.device.dry`: its process groups exist, and move nothing."""
    from megatron.core import parallel_state

    init_fake_process_group(rank, world_size)
    try:
        initialize_megatron(config)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_rank(config: Config, world_size: int, rank: int) -> BuiltRank:
    """Build what a rank of a job builds.

    Args:
        config: resolved for ``world_size``.
        world_size: ranks of the job.
        rank: one of them.
    """
    from megatron_hyperp.model.build import build_balance
    from megatron_hyperp.parameters import named_parameters

    report: list[str] = []
    with device.dry(), as_rank(config, rank, world_size):
        chunks, optimizer = build(_without_libraries(config), build_balance(config), log=report.append)
        named = [pair for chunk in chunks for pair in named_parameters(chunk)]
        coordinates = _coordinates(config)
        stage, _ = coordinates["pipeline"]
        held = [bucket.held for bucket in optimizer.exchange.buckets]
        master = sum(family.master.nbytes for family in optimizer.families)
        memory = Memory(
            weights=sum(weights for weights, _ in held),
            gradients=sum(gradients for _, gradients in held),
            master=master,
            momentum=optimizer.state_bytes() - master,
            activations=activation_bytes(config, stage, micro_batches(config, world_size)),
            step=2 * master,
        )
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        return BuiltRank(rank, coordinates, shapes, memory, ownership(optimizer.domains), report)


def _without_libraries(config: Config) -> Config:
    """The same parameters, in layers that need no library of CUDA machines."""
    training = replace(
        config.training,
        transformer_impl="local",
        fp8_format="none",
        fp8_emulation=False,
        fp8_param_gather=False,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return replace(config, training=training)


def _coordinates(config: Config) -> dict[str, tuple[int, int]]:
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    if config.moe.num_experts:
        groups["expert"] = parallel_state.get_expert_model_parallel_group()
        groups["expert tensor"] = parallel_state.get_expert_tensor_parallel_group()
        groups["expert data"] = parallel_state.get_expert_data_parallel_group()
    return {name: (group.rank(), group.size()) for name, group in groups.items()}


def ownership(domains: Sequence[Any]) -> list[tuple[str, ...]]:
    """Rows on who orthogonalizes what, of the optimizer's domains; experts are dealt out on top of the other work."""
    head = ("owners of matrices", "ranks", "matrices", "owners", "team", "mean ms", "max ms", "max/mean", "this rank")
    rows: list[tuple[str, ...]] = [head]
    for title, domain in zip(("all but experts", "experts"), domains, strict=False):
        plan = domain.plan
        matrices = [entry.rule.newton_schulz is not None for entry in domain.routes]
        owners = {piece.rank for piece in plan.pieces if matrices[piece.route]}
        mine = sum(matrices[piece.route] for piece in domain.mine)
        times = [1e3 * sum(plan.loads) / len(plan.loads), 1e3 * max(plan.loads), plan.imbalance]
        counts = [len(plan.loads), sum(matrices), len(owners), plan.team]
        rows.append((title, *map(str, counts), *(f"{value:.3f}" for value in times), str(mine)))
    return rows


def _position_lines(built: BuiltRank, cluster: Cluster) -> list[str]:
    """Where a rank is, and what it holds."""
    place = ", ".join(f"{name} {rank} of {size}" for name, (rank, size) in built.coordinates.items())
    layers = {int(number) for name in built.shapes for number in re.findall(r"layers\.(\d+)\.", name)}
    experts = {int(number) for name in built.shapes for number in re.findall(r"local_experts\.(\d+)\.", name)}
    held = ["embedding"] * any("embedding" in name for name in built.shapes)
    held.append(f"layers {_ranges(layers)}")
    if experts:
        held[-1] += f" with experts {_ranges(experts)}"
    held += ["output"] * any("output_layer" in name for name in built.shapes)
    return [
        f"rank {built.rank} of {cluster.gpus}, on node {built.rank // cluster.per_node}: {place}",
        f"  {built.parameters:,} parameters in {len(built.shapes)} tensors: {', '.join(held)}",
    ]


def _ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 6, 7}`` -> ``0-2, 6-7``."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in zip(starts, ends, strict=True))
