"""Which layouts fit a number of GPUs, which of those is likely fastest, and why the others do not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from megatron_hyperp.config import Config, data_parallel_size, micro_batches
from megatron_hyperp.errors import UsageError
from megatron_hyperp.estimate import train_flops_per_token
from megatron_hyperp.hardware import GIB, Gpu
from megatron_hyperp.planning.checkpoints import Storage
from megatron_hyperp.planning.memory import Holding, Memory, holdings, stage_memory
from megatron_hyperp.planning.traffic import NewtonSchulzCost, Traffic, newton_schulz_cost, traffic

# Full recomputation runs the forward pass, a third of the FLOPs, once more.
RECOMPUTED = {"none": 1.0, "selective": 1.0, "full": 4 / 3}
# From the fastest on; a layout takes the first that fits.
MODES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
# The backward pass, two thirds of the time, hides reductions; the forward pass hides the gathering of weights.
HIDDEN = 0.9
# More chunks per pipeline stage keep more activations and send more; they must save 2% or more.
WORTHWHILE = 0.98


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to run on.

    Attributes:
        gpu: their kind.
        gpus: how many.
        per_node: of them in each node.
        mfu: model FLOPs utilization to expect, of the peak.
        memory_fraction: of a GPU's memory that may be used; kernels, communication and fragmentation need the rest.
        storage: of checkpoints, if that is known.
    """

    gpu: Gpu
    gpus: int
    per_node: int = 8
    mfu: float = 0.4
    memory_fraction: float = 0.9
    storage: Storage | None = None

    @property
    def usable(self) -> float:
        """Bytes of one GPU."""
        return self.memory_fraction * self.gpu.memory

    @property
    def flops_per_s(self) -> float:
        """Of all GPUs at the expected MFU."""
        return self.gpus * self.gpu.tflops * 1e12 * self.mfu

    def bytes_per_s(self, ranks: int) -> float:
        """Rate at which a GPU sends to a group of so many neighbouring ranks."""
        return self.gpu.node_bytes_per_s if ranks <= self.per_node else self.gpu.network_bytes_per_s


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to spread the model, with what it costs.

    Attributes:
        config: resolved.
        world_size: ranks.
        memory: of the fullest rank.
        traffic: of a rank in a step.
        newton_schulz: of the busiest rank.
        seconds: predicted for a step, by which layouts are ranked: computation at the expected MFU, pipeline bubble,
            recomputation, communication that computation does not hide, Newton-Schulz.
    """

    config: Config
    world_size: int
    memory: Memory
    traffic: Traffic
    newton_schulz: NewtonSchulzCost
    seconds: float

    @property
    def parallelism(self) -> dict[str, int]:
        """Sizes by their short names."""
        parallel = self.config.parallel
        return {
            "tp": parallel.tensor_model_parallel_size,
            "pp": parallel.pipeline_model_parallel_size,
            "vpp": parallel.num_virtual_stages_per_pipeline_rank,
            "ep": parallel.expert_model_parallel_size,
            "dp": data_parallel_size(self.config, self.world_size),
        }

    @property
    def recompute(self) -> str:
        """What is recomputed."""
        return self.config.training.recompute_granularity

    def describe(self) -> str:
        """Name it in a few words."""
        return _title(self.parallelism, self.recompute)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A layout that cannot run, and why.

    Attributes:
        title: its sizes.
        reason: why not.
        need: bytes that it would take of a GPU; None if its sizes do not divide what they share.
    """

    title: str
    reason: str
    need: int | None = None


def _title(sizes: dict[str, int], recompute: str) -> str:
    words = " ".join(f"{name.upper()}{size}" for name, size in sizes.items() if size > 1) or "one GPU"
    return words + ("" if recompute == "none" else f", {recompute} recomputation")


def layouts(config: Config, cluster: Cluster) -> tuple[list[Layout], list[Rejected]]:
    """Try the layouts of a cluster; return those that fit, the fastest first, and the others.

    A parallel size or recomputation that the config sets (above 1, or other than none) is kept.

    Args:
        config: not resolved, with a vocabulary size.
        cluster: what there is to run on.
    """
    fitting: list[Layout] = []
    rejected: list[Rejected] = []
    for candidate, sizes in _candidates(config, cluster):
        try:
            resolved = candidate.resolve(world_size=cluster.gpus)
        except UsageError as error:
            rejected.append(Rejected(_title(sizes, "none"), str(error)))
            continue
        layout = _scheduled(resolved, cluster)
        if layout.memory.total <= cluster.usable:
            fitting.append(layout)
        else:
            rejected.append(_too_large(layout, sizes, cluster))
    return sorted(fitting, key=lambda layout: layout.seconds), rejected


def _scheduled(config: Config, cluster: Cluster) -> Layout:
    """Interleave the pipeline's schedule where that fits and is worthwhile."""
    # However a stage's layers are cut into chunks, it holds as many of the same shapes.
    held = _held(config, cluster.gpus)
    best = _spare(config, cluster, held)
    if best.memory.total > cluster.usable:
        return best
    for chunks in _chunks(config, cluster.gpus):
        parallel = replace(config.parallel, num_virtual_stages_per_pipeline_rank=chunks)
        layout = _spare(replace(config, parallel=parallel), cluster, held)
        if layout.memory.total <= cluster.usable and layout.seconds < WORTHWHILE * best.seconds:
            best = layout
    return best


def _chunks(config: Config, world_size: int) -> list[int]:
    """Numbers of chunks per pipeline stage that may be, above 1; none if one is given."""
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    # The interleaved schedule takes micro-batches in rounds of as many as there are stages.
    if stages == 1 or parallel.num_virtual_stages_per_pipeline_rank > 1 or micro_batches(config, world_size) % stages:
        return []
    # Whole layers, and whole groups of those that are recomputed together.
    units = config.model.num_layers // stages // config.training.recompute_num_layers
    return [size for size in range(2, units + 1) if units % size == 0]


def _spare(config: Config, cluster: Cluster, held: dict[int, list[Holding]]) -> Layout:
    """Recompute as little as fits, or all that can be."""
    asked = config.training.recompute_granularity
    for mode in _modes(config) if asked == "none" else (asked,):
        tried = replace(config, training=replace(config.training, recompute_granularity=mode))
        layout = evaluate(tried, cluster, held)
        if layout.memory.total <= cluster.usable:
            break
    return layout


def _too_large(layout: Layout, sizes: dict[str, int], cluster: Cluster) -> Rejected:
    need = layout.memory.total
    even = ", even with full recomputation" if layout.recompute == "full" else ""
    reason = f"needs {need / GIB:.1f} GiB of {cluster.usable / GIB:.1f}{even}"
    return Rejected(_title(sizes, "none"), reason, need)


def _modes(config: Config) -> list[Literal["none", "selective", "full"]]:
    """What may be recomputed: of fused attention alone nothing."""
    fused = config.training.attention_backend != "local"
    return [mode for mode in MODES if not (fused and mode == "selective")]


def _candidates(config: Config, cluster: Cluster) -> Iterator[tuple[Config, dict[str, int]]]:
    """Yield configs, and their sizes by short names, of the layouts that are worth a look."""
    parallel = config.parallel
    tensor = _sizes(parallel.tensor_model_parallel_size, cluster.per_node, cluster.gpus)
    experts = bool(config.moe.num_experts or config.moe.moe_topk)
    for tp in tensor:
        for pp in _sizes(parallel.pipeline_model_parallel_size, cluster.gpus // tp, cluster.gpus // tp):
            for ep in _sizes(parallel.expert_model_parallel_size, 64, cluster.gpus // pp) if experts else [1]:
                candidate = copy.deepcopy(config)
                candidate.parallel = replace(
                    parallel,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    expert_model_parallel_size=ep,
                    sequence_parallel=tp > 1,
                )
                yield candidate, {"tp": tp, "pp": pp, "ep": ep, "dp": cluster.gpus // tp // pp}


def _sizes(given: int, largest: int, ranks: int) -> list[int]:
    """The size that is given, or the divisors of the ranks."""
    if given > 1:
        return [given]
    return [size for size in range(1, min(largest, ranks) + 1) if ranks % size == 0]


def _held(config: Config, world_size: int) -> dict[int, list[Holding]]:
    """What a rank of the first, a middle and the last pipeline stage holds."""
    stages = config.parallel.pipeline_model_parallel_size
    return {stage: holdings(config, world_size, stage) for stage in {0, min(1, stages - 1), stages - 1}}


def evaluate(config: Config, cluster: Cluster, by_stage: dict[int, list[Holding]] | None = None) -> Layout:
    """Return what a resolved config's layout costs; ``by_stage`` is what its ranks hold, if that is known already."""
    by_stage = by_stage or _held(config, cluster.gpus)
    by_memory = (stage_memory(config, cluster.gpus, stage, held) for stage, held in by_stage.items())
    memory = max(by_memory, key=lambda item: item.total)
    held = by_stage[min(by_stage, key=lambda stage: abs(stage - 1))]
    sent = traffic(config, cluster.gpus, held)
    flops = train_flops_per_token(config.model, config.moe) * config.batch_tokens
    newton_schulz = newton_schulz_cost(config, cluster.gpus, held, flops)
    compute = flops / cluster.flops_per_s
    seconds = compute * RECOMPUTED[config.training.recompute_granularity] * (1 + bubble(config, cluster.gpus))
    seconds += _exposed(config, cluster, sent, compute) + newton_schulz.seconds
    return Layout(config, cluster.gpus, memory, sent, newton_schulz, seconds)


def bubble(config: Config, world_size: int) -> float:
    """Idle time of the pipeline over its working time, (p - 1) / (m v) (Narayanan et al., arXiv 2104.04473)."""
    parallel = config.parallel
    idle = parallel.pipeline_model_parallel_size - 1
    return idle / micro_batches(config, world_size) / parallel.num_virtual_stages_per_pipeline_rank


def _exposed(config: Config, cluster: Cluster, sent: Traffic, compute: float) -> float:
    """Seconds of communication in a step that computation does not hide."""
    parallel = config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    layer = sent.tensor / cluster.bytes_per_s(tp) + sent.expert / cluster.bytes_per_s(tp * ep)
    stages = sent.pipeline / cluster.bytes_per_s(cluster.gpus if pp > 1 else 1)
    data = sent.data / cluster.bytes_per_s(cluster.gpus // pp)
    return layer + stages + max(0.0, data - HIDDEN * compute)


def to_dict(layout: Layout) -> dict[str, object]:
    """Return a layout's figures under the names that they have in JSON."""
    return {
        "parallelism": layout.parallelism,
        "recompute_granularity": layout.recompute,
        "micro_batch_size": layout.config.training.micro_batch_size,
        "memory_bytes_per_gpu": layout.memory.to_dict(),
        "bytes_sent_per_gpu_and_step": asdict(layout.traffic),
        "newton_schulz_per_gpu_and_step": asdict(layout.newton_schulz),
        "pipeline_bubble": bubble(layout.config, layout.world_size),
        "ranking_seconds_per_step": layout.seconds,
    }
