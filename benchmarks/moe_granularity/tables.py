"""Rows of figures: what they are computed from, how they are printed and written."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.moe_granularity.measuring import Output, mean

Row = dict[str, Any]
# The power of a token's probabilities that its gates are.
POWERS = {"sqrt": 0.5, "softmax": 1.0}


def expected_expert_rms() -> float:
    """RMS of an expert's output for inputs of RMS 1, whatever its FFN size f.

    On its sphere, fc1 [2f, w] has elements of variance 1/(3w), so gate h and up u have variance 1/3; fc2 [w, f] has
    elements of variance 1/(3f) and sums f products: E[silu(h)^2 u^2] f / (3f) = E[silu(h)^2] / 9.
    """
    z = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    silu = torch.nn.functional.silu(z / math.sqrt(3))
    return math.sqrt(float(torch.trapezoid(density * silu**2, z)) / 9)


def expected_gate_squares(gate: str, topk: int, experts: int) -> float:
    """Mean of sum_i g_i^2 for inputs of RMS 1, by drawing logits.

    On its sphere the router [experts, w] has elements of variance 1/(3w), so logits have variance 1/3.

    Args:
        gate: "sqrt" or "softmax".
        topk: routed experts of a token.
        experts: all routed experts.
    """
    logits = torch.randn(10_000, experts, generator=torch.Generator().manual_seed(0)) / math.sqrt(3)
    gates = torch.softmax(logits.topk(topk).values, dim=-1) ** POWERS[gate]
    return float(gates.square().sum(dim=-1).mean())


def geometric(values: Iterable[float]) -> float:
    """Geometric mean."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def slope(rows: Sequence[Row], key: str) -> float:
    """Least-squares slope of log ``key`` over log K."""
    x = [math.log(row["K"]) for row in rows]
    y = [math.log(row[key]) for row in rows]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def vertex(losses: Mapping[int, float]) -> float:
    """Where the parabola through the lowest loss and its neighbours is lowest; an edge stays one."""
    best = min(losses, key=lambda power: losses[power])
    if best - 1 not in losses or best + 1 not in losses:
        return float(best)
    left, right = losses[best - 1] - losses[best], losses[best + 1] - losses[best]
    return best + (left - right) / (2 * (left + right))


def columns_of(of_seeds: Sequence[Sequence[Output]], prefix: str = "") -> Row:
    """Columns of some blocks: mean squares over seeds, then geometric means over blocks; and each block's RMS.

    Args:
        of_seeds: for each seed, the outputs of the blocks in order.
        prefix: of the columns' names.
    """
    layers = [mean(outputs) for outputs in zip(*of_seeds, strict=True)]
    row = {
        f"{prefix}rms": geometric(o.rms for o in layers),
        f"{prefix}gates": geometric(o.gates for o in layers),
        f"{prefix}expert": geometric(o.expert_rms for o in layers),
        f"{prefix}coherence": geometric(o.coherence for o in layers),
        f"{prefix}constant": geometric(o.constant / o.block for o in layers),
    }
    if len(layers) > 1:
        row.update({f"{prefix}rms layer {number}": o.rms for number, o in enumerate(layers, start=1)})
    return row


def relate(rows: Sequence[Row], *keys: str) -> None:
    """Add columns relative to the first row, that of the smallest K."""
    for key in keys:
        for row in rows:
            row[f"{key} ratio"] = row[key] / rows[0][key]


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return a Markdown table of some columns, by their titles, after K; a missing value is a dash."""
    lines = [["K", *columns.values()], ["---:"] * (len(columns) + 1)]
    for row in rows:
        lines.append([str(row["K"]), *(f"{row[key]:.3f}" if key in row else "-" for key in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
