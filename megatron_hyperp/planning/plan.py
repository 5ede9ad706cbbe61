"""A run from the config alone: size, budget, learning rate, layout and time, as a table, JSON or a config file."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_hyperp.config import Config
from megatron_hyperp.estimate import parameter_count, train_flops_per_token
from megatron_hyperp.hardware import GIB
from megatron_hyperp.planning import checkpoints
from megatron_hyperp.planning.checkpoints import Cadence, cadence, checkpoint_bytes
from megatron_hyperp.planning.layouts import Cluster, Layout, Rejected, layouts, to_dict
from megatron_hyperp.planning.memory import Memory
from megatron_hyperp.text import aligned
from megatron_hyperp.transfer import LearningRate

# Of the paper, for plans made before there is a tokenizer.
PAPER_VOCABULARY = 32000
SHOWN = 5


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A planned run.

    Attributes:
        config: resolved: what does not depend on the layout.
        asked: the config as given.
        cluster: what it is to run on.
        fitting: layouts that fit, the one to take first.
        rejected: those that do not.
    """

    config: Config
    asked: Config
    cluster: Cluster
    fitting: list[Layout]
    rejected: list[Rejected]

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        return train_flops_per_token(self.config.model, self.config.moe) * self.config.training.train_tokens

    @property
    def hours(self) -> float:
        """Time on the cluster at the expected MFU."""
        return self.flops / self.cluster.flops_per_s / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint's tensors."""
        alone = dataclasses.replace(self.config, parallel=type(self.config.parallel)())
        return checkpoint_bytes(alone)

    @property
    def cadence(self) -> Cadence | None:
        """How often to save, if it is known where."""
        storage = self.cluster.storage
        step = 3600 * self.hours / self.config.training.train_iters
        return cadence(self.checkpoint_bytes, storage, self.cluster.gpus, step) if storage else None

    @property
    def learning_rate(self) -> LearningRate:
        """The peak learning rate with its factors."""
        return self.config.learning_rate()


def make_plan(config: Config, cluster: Cluster) -> RunPlan:
    """Plan a run.

    Args:
        config: not resolved; without a vocabulary it gets the paper's.
        cluster: what to run it on.

    Raises:
        UsageError: the config cannot run on any number of ranks.
    """
    filled = with_vocabulary(config)
    # Parallel sizes may need more ranks than one.
    alone = dataclasses.replace(filled, parallel=type(config.parallel)())
    fitting, rejected = layouts(filled, cluster)
    return RunPlan(alone.resolve(world_size=1), config, cluster, fitting, rejected)


def with_vocabulary(config: Config) -> Config:
    """Return the config, not resolved, with the paper's vocabulary if it has none."""
    filled = dataclasses.replace(config, model=dataclasses.replace(config.model))
    if filled.model.vocab_size is None:
        filled.model.vocab_size = PAPER_VOCABULARY
    return filled


def to_json(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as plain values; without a layout that fits, ``parallelism`` and what follows are null."""
    model, training = plan.config.model, plan.config.training
    result: dict[str, Any] = {
        "depth": model.num_layers,
        "hidden_size": model.hidden_size,
        "params_total": parameter_count(model, plan.config.moe),
        "params_active": parameter_count(model, plan.config.moe, active=True),
        "tokens": round(training.train_tokens),
        "flops": plan.flops,
        "lr": plan.learning_rate.value,
        "lr_multiplier": plan.learning_rate.multiplier,
        "lr_factors": {name: value for name, _, value in plan.learning_rate.factors},
        "lr_roles": {rate.role: rate.multiplier for rate in plan.learning_rate.roles},
        "weight_decay": plan.config.optimizer.weight_decay,
        "global_batch_tokens": plan.config.batch_tokens,
        "train_iters": training.train_iters,
        "gpus": plan.cluster.gpus,
        "mfu": plan.cluster.mfu,
        "hours": plan.hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_cadence": dataclasses.asdict(plan.cadence) if plan.cadence else None,
        "memory_bytes_per_gpu": None,
        "parallelism": None,
    }
    if plan.fitting:
        result.update(to_dict(plan.fitting[0]))
    result["alternatives"] = [to_dict(layout) for layout in plan.fitting[1:SHOWN]]
    result["rejected"] = [dataclasses.asdict(item) for item in plan.rejected]
    return result


def to_yaml(plan: RunPlan) -> str:
    """Return a config for the trainer: what was given and differs from the defaults, and the layout to take."""
    layout = plan.fitting[0]
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for section in dataclasses.fields(plan.asked):
        given, default = getattr(plan.asked, section.name), getattr(Config(), section.name)
        for item in dataclasses.fields(given):
            if getattr(given, item.name) != getattr(default, item.name):
                sections[section.name][item.name] = getattr(given, item.name)
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "expert_model_parallel_size",
        "sequence_parallel",
    ):
        sections["parallel"][name] = getattr(layout.config.parallel, name)
    sections["training"]["recompute_granularity"] = layout.recompute
    head = f"# {plan.cluster.gpus} GPUs, {layout.describe()}: {layout.memory.total / GIB:.1f} GiB on each,"
    head += f" {plan.hours:,.1f} hours at {plan.cluster.mfu:.0%} MFU\n"
    return head + yaml.safe_dump(dict(sections), sort_keys=False)


def describe(plan: RunPlan) -> str:
    """Return the plan as a table for people."""
    return "\n".join([*run_lines(plan), "", *_layout_lines(plan)])


def run_lines(plan: RunPlan) -> list[str]:
    """Return size, budget, learning rate and time: what does not depend on the layout."""
    return [
        *size_lines(plan),
        *_indented("optimizer", f"{plan.config.optimizer.optimizer}, {plan.learning_rate.describe()}"),
        f"time           {plan.hours:,.1f} hours on {plan.cluster.gpus} GPUs at {plan.cluster.mfu:.0%} MFU",
        *_indented("checkpoint", checkpoints.describe(plan.checkpoint_bytes, plan.cluster.storage, plan.cadence)),
    ]


def size_lines(plan: RunPlan) -> list[str]:
    """Return size and budget: what does not depend on the cluster."""
    model, moe, training = plan.config.model, plan.config.moe, plan.config.training
    total, active = parameter_count(model, moe), parameter_count(model, moe, active=True)
    size = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    return [
        f"model          {model.num_layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size}: {size}",
        f"tokens         {training.train_tokens:,.0f} in {training.train_iters:,} steps of {plan.config.batch_tokens:,}"
        f" ({training.global_batch_size} sequences of {model.seq_length})",
        f"FLOPs          {plan.flops:.4g}",
    ]


def _indented(title: str, text: str) -> list[str]:
    first, *others = text.split("\n")
    return [f"{title:14s} {first}", *(" " * 11 + line for line in others)]


def _layout_lines(plan: RunPlan) -> list[str]:
    usable = f"{plan.cluster.usable / GIB:.1f} GiB"
    if not plan.fitting:
        lines = [f"No layout fits {plan.cluster.gpus} GPUs with {usable} each."]
    else:
        best = plan.fitting[0]
        lines = [f"Take {best.describe()} (of {len(plan.fitting)} layouts that fit {usable}):"]
        memories = {layout.describe(): layout.memory for layout in plan.fitting[:SHOWN]}
        seconds = [f"{layout.seconds:.2f} s" for layout in plan.fitting[:SHOWN]]
        lines += ["", *memory_table(memories, {"step (rank)": seconds}), "", *cost_lines(best)]
    if plan.rejected:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for item in plan.rejected:
            by_reason[item.reason].append(item.title)
        lines += ["", "Rejected:"]
        lines += [f"  {_shortened(titles)}: {reason}" for reason, titles in by_reason.items()]
    return lines + _expert_lines(plan)


def _expert_lines(plan: RunPlan) -> list[str]:
    """Return a hint where no number of these GPUs but one divides the routed experts."""
    experts, node = plan.config.moe.num_experts, plan.cluster.per_node
    if not experts or math.gcd(experts, plan.cluster.gpus) > 1 or plan.cluster.gpus == 1:
        return []
    more = -(-experts // node) * node
    return [
        "",
        f"No expert parallelism: {plan.cluster.gpus} GPUs and {experts} routed experts have no common divisor. For one,"
        f" make a model of {more}: --num-experts {more}",
    ]


def _shortened(titles: list[str]) -> str:
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return "; ".join(titles[:3]) + more


def memory_table(memories: Mapping[str, Memory], others: Mapping[str, list[str]] | None = None) -> list[str]:
    """Return a table of memory by title; ``others`` are further columns by name."""
    others = others or {}
    parts = next(iter(memories.values())).to_dict()
    rows = [["GiB per GPU", *parts, *others]]
    for index, (title, memory) in enumerate(memories.items()):
        cells = [f"{value / GIB:.2f}" for value in memory.to_dict().values()]
        rows.append([title, *cells, *(column[index] for column in others.values())])
    return ["  " + line for line in aligned(rows, right=lambda column: column > 0)]


def cost_lines(layout: Layout) -> list[str]:
    """Return what a rank sends in a step, and what Newton-Schulz costs it."""
    sent = dataclasses.asdict(layout.traffic)
    cost = layout.newton_schulz
    named = ", ".join(f"{name.replace('_', '-')} {value / 1e9:.2f}" for name, value in sent.items() if value)
    return [
        f"  sent by a GPU in a step, GB: {named or 'nothing'}",
        f"  Newton-Schulz: {cost.flops:.3g} FLOPs on the busiest GPU, {cost.share:.2%} of the model's;"
        f" predicted {1e3 * cost.seconds:.1f} ms",
    ]
