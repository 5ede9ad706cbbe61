"""Steps that are taken by gloo ranks of this machine: what the busiest rank does in one, and how long it takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.optimizer_step.measuring import WARM_UPS, counted, largest, run_ranks, slowest
from benchmarks.optimizer_step.slices import Slice, config_of
from benchmarks.optimizer_step.whole_step import timed_step
from benchmarks.turns import in_turns
from megatron_hyperp import device
from megatron_hyperp.config import Config
from megatron_hyperp.optim.tensor_parallel import AUTO
from megatron_hyperp.training.setup import initialize_megatron


@dataclass(frozen=True, slots=True)
class Case:
    """A slice of a model on some ranks.

    Attributes:
        title: of the slice.
        part: the slice.
        tensor_ranks: that share each matrix; the others are data-parallel.
        ranks: in all.
    """

    title: str
    part: Slice
    tensor_ranks: int
    ranks: int

    @property
    def layout(self) -> str:
        """Sizes by their short names."""
        data = self.ranks // self.tensor_ranks
        return " ".join(f"{name}{size}" for name, size in (("TP", self.tensor_ranks), ("DP", data)) if size > 1) or "-"

    def config(self) -> Config:
        """Return the resolved config."""
        return config_of(self.part, self.tensor_ranks, "hyperp", AUTO, self.ranks)


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was taken.

    Attributes:
        flops: of Newton-Schulz, by PyTorch's counter of matrix products.
        sent: bytes, by ring algorithms.
        collectives: in which a rank met others.
        seconds: of the slowest rank, the median over repetitions; 0 if none was timed.
    """

    flops: float
    sent: float
    collectives: int
    seconds: float


def take(cases: Sequence[Case], repeats: int, port: str) -> list[Taken]:
    """Take the steps of all cases of one number of ranks; without repetitions they are counted alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "taken.json"
        run_ranks(_take_all, cases[0].ranks, port, cases, repeats, path)
        return [Taken(**item) for item in json.loads(path.read_text())]


def _take_all(cases: Sequence[Case], repeats: int, path: Path) -> None:
    """Run by every rank."""
    from megatron.core import parallel_state

    device.adapt_megatron()
    taken = []
    for case in cases:
        initialize_megatron(case.config())
        taken.append(_take(case, repeats))
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        path.write_text(json.dumps([asdict(item) for item in taken]))


def _take(case: Case, repeats: int) -> Taken:
    from benchmarks.optimizer_step.methods import Ours, local_gradients

    config = case.config()
    gradients = local_gradients(config)
    seconds = 0.0
    if repeats:
        step = slowest(partial(timed_step, Ours(config), gradients))
        seconds = in_turns({"step": step}, repeats, warm_ups=WARM_UPS)["step"][0]
    # Another one, for a counter takes time.
    with _newton_schulz_counted() as flops:
        method = Ours(config)
    method.load(gradients)
    with counted() as traffic:
        method.step()
    products, sent, collectives = largest([sum(flops), traffic.sent, float(traffic.collectives)]).tolist()
    return Taken(products, sent, int(collectives), seconds)


@contextmanager
def _newton_schulz_counted() -> Iterator[list[float]]:
    """Within, optimizers are built whose Newton-Schulz adds its FLOPs to the list."""
    from megatron_hyperp.optim.rules import base

    original, found = base.orthogonalize_family, list[float]()

    def counting(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = original(*args, **kwargs)
        found.append(counter.get_total_flops())
        return result

    with patch.object(base, "orthogonalize_family", counting):
        yield found
