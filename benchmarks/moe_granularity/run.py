"""Granularity of a mixture of experts: does its output's size, or its best learning rate, depend on top-k K?

At constant sparsity S, K of S x K experts of FFN size 4w/K serve each token of a tiny GPTModel on Python's own sources,
with SqrtGate and with softmax gates. Three parts: ``start``, the output of the blocks of an untrained model, and of one
block on random inputs; ``trained``, the same after training; ``transfer``, held-out losses over learning rates, for K =
2, 4, 8. Prints tables; writes one CSV file a part and a picture under --output.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.moe_granularity.measuring import Case, at_start, trained, write_corpus
from benchmarks.moe_granularity.picture import draw
from benchmarks.moe_granularity.tables import (
    POWERS,
    Row,
    columns_of,
    expected_expert_rms,
    expected_gate_squares,
    relate,
    slope,
    table,
    vertex,
    write,
)
from benchmarks.optimizer_step.measuring import SETTINGS
from megatron_hyperp.errors import UsageError, run_command

# Losses of each seed, by power of 2 of the learning rate.
Losses = dict[int, list[float]]
# K, of the parts start and trained, and of transfer.
TOPK, TRANSFERRED = (1, 2, 4, 8, 16, 32, 64), (2, 4, 8)
# Learning rates tried first: powers of 2, times --lr for the smallest K, times its best one for the others.
FIRST, AROUND = (-2, -1, 0, 1), (-1, 0, 1)
# A search goes no further than this power.
WIDEST = 4


class Runner:
    """Measures each case once, in worker processes of one thread; in this one, if there is to be just one.

    Args:
        workers: processes.
        folder: of the corpus.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        os.environ.update(SETTINGS)
        self._known: dict[tuple[str, Case], concurrent.futures.Future[Any]] = {}
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,))
        else:
            torch.set_num_threads(1)
        self._prefix = self._start(write_corpus, folder).result()

    def _start(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
        if self._pool:
            return self._pool.submit(function, *arguments)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future

    def begin(self, function: Callable[[Case, str], Any], cases: Iterable[Case]) -> None:
        """Have cases measured, the slowest ones first."""
        for case in sorted(cases, key=lambda case: -case.topk):
            if (function.__name__, case) not in self._known:
                self._known[function.__name__, case] = self._start(function, case, self._prefix)

    def map(self, function: Callable[[Case, str], Any], cases: list[Case]) -> list[Any]:
        """Return what ``function`` measures of each case."""
        self.begin(function, cases)
        return [self._known[function.__name__, case].result() for case in cases]


class Cases:
    """The cases that the options ask for, for all seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def untrained(self, topk: int, gate: str, shared: bool) -> list[Case]:
        """Models as they are built."""
        return self._of(self._options.start_seeds, topk=topk, gate=gate, shared=shared)

    def trained(self, topk: int, gate: str, power: int = 0) -> list[Case]:
        """Trainings at 2 ** ``power`` times the learning rate of the options."""
        options = self._options
        # Gates of one expert are 1, whatever they are called.
        gate = "sqrt" if topk == 1 else gate
        return self._of(options.seeds, topk=topk, gate=gate, lr=options.lr * 2.0**power, iterations=options.iterations)

    def _of(self, seeds: int, **fields: Any) -> list[Case]:
        options = self._options
        return [
            Case(seed=seed, sparsity=options.sparsity, width=options.width, **fields) for seed in range(1, seeds + 1)
        ]


def start(options: argparse.Namespace, runner: Runner) -> list[Row]:
    """Measure untrained models, with and without a shared expert."""
    print(f"\n# At the start: {options.start_seeds} seeds; width {options.width}, S = {options.sparsity}")
    print(f"The RMS of an expert's output on random inputs should be {expected_expert_rms():.3f}, whatever its size.")
    cases = Cases(options)
    models = [(gate, shared) for shared in (False, True) for gate in POWERS]
    # A shared expert leaves none of one to route.
    sizes = {shared: [topk for topk in options.topk if topk > shared] for shared in (False, True)}
    for gate, shared in models:
        runner.begin(at_start, (case for topk in sizes[shared] for case in cases.untrained(topk, gate, shared)))
    result = []
    for gate, shared in models:
        rows = []
        for topk in sizes[shared]:
            in_model, alone = zip(*runner.map(at_start, cases.untrained(topk, gate, shared)), strict=True)
            expected = expected_gate_squares(gate, topk - shared, options.sparsity * topk - shared)
            row: Row = {"gate": gate, "shared": shared, "K": topk, "expected gates": expected}
            rows.append(row | columns_of([[output] for output in alone], "random ") | columns_of(in_model))
        print_start(rows)
        result += rows
    return result


def print_start(rows: list[Row]) -> None:
    """Print the table of one kind of untrained model."""
    relate(rows, "random rms", "rms")
    columns = {
        "random rms ratio": "RMS, random inputs",
        "rms ratio": "RMS, in the model",
        "random gates": "sum of g^2",
        "expected gates": "expected",
        "random expert": "RMS of an expert",
        "random coherence": "coherence",
    }
    shared = ", with a shared expert" if rows[0]["shared"] else ""
    print(f"\n{rows[0]['gate']} gates{shared}; RMS relative to K = {rows[0]['K']}\n\n{table(rows, columns)}")
    if not shared:
        slopes = f"{slope(rows, 'random rms'):.3f} on random inputs, {slope(rows, 'rms'):.3f} in the model"
        print(f"\nslope over log K: {slopes}")


def after_training(options: argparse.Namespace, runner: Runner) -> list[Row]:
    """Measure trained models."""
    print(f"\n# After {options.iterations} iterations at the learning rate {options.lr:g}: {options.seeds} seeds")
    cases = Cases(options)
    runner.begin(trained, (case for gate in POWERS for topk in options.topk for case in cases.trained(topk, gate)))
    result = []
    for gate in POWERS:
        rows = []
        for topk in options.topk:
            outputs, losses = zip(*runner.map(trained, cases.trained(topk, gate)), strict=True)
            rows.append({"gate": gate, "K": topk, "loss": mean(losses), **columns_of(outputs)})
        relate(rows, "rms")
        columns = {
            "rms": "RMS",
            "rms ratio": "relative",
            "gates": "sum of g^2",
            "expert": "RMS of an expert",
            "coherence": "coherence",
            "constant": "constant share",
            "loss": "held-out loss",
        }
        print(f"\n{gate} gates\n\n{table(rows, columns)}\n\nslope of the RMS over log K: {slope(rows, 'rms'):.3f}")
        result += rows
    return result


def transfer(options: argparse.Namespace, runner: Runner) -> list[Row]:
    """Search the best learning rate for each K, around the best one of the smallest."""
    print(f"\n# Learning rates: held-out losses after {options.iterations} iterations, {options.seeds} seeds")
    cases = Cases(options)
    smallest, *others = options.transfer_topk
    runner.begin(trained, (case for gate in POWERS for power in FIRST for case in cases.trained(smallest, gate, power)))
    losses: dict[str, dict[int, Losses]] = {}
    for gate in POWERS:
        losses[gate] = {smallest: search(runner, cases, gate, smallest, FIRST)}
        around = [lowest(losses[gate][smallest]) + offset for offset in AROUND]
        runner.begin(trained, (case for k in others for power in around for case in cases.trained(k, gate, power)))
    for gate in POWERS:
        around = [lowest(losses[gate][smallest]) + offset for offset in AROUND]
        losses[gate].update({topk: search(runner, cases, gate, topk, around) for topk in others})
        print_transfer(gate, losses[gate], options.lr)
    return [
        {"gate": gate, "K": topk, "lr": options.lr * 2.0**power, "seed": seed, "loss": loss}
        for gate, by_topk in losses.items()
        for topk, by_power in by_topk.items()
        for power, of_seeds in by_power.items()
        for seed, loss in enumerate(of_seeds, start=1)
    ]


def lowest(losses: Losses) -> int:
    """Return the power of 2 at which the mean loss is lowest."""
    return min(losses, key=lambda power: mean(losses[power]))


def search(runner: Runner, cases: Cases, gate: str, topk: int, powers: Iterable[int]) -> Losses:
    """Return losses by power of 2 of the learning rate; the grid is widened past its minimum."""
    wanted = sorted(powers)
    while True:
        runner.begin(trained, (case for power in wanted for case in cases.trained(topk, gate, power)))
        measured = {power: runner.map(trained, cases.trained(topk, gate, power)) for power in wanted}
        losses = {power: [loss for _, loss in of_seeds] for power, of_seeds in measured.items()}
        best = lowest(losses)
        if wanted[0] < best < wanted[-1] or abs(best) >= WIDEST:
            return losses
        wanted = [best - 1, *wanted] if best == wanted[0] else [*wanted, best + 1]


def print_transfer(gate: str, losses: dict[int, Losses], lr: float) -> None:
    """Print the losses with one gate, by K and learning rate, and where parabolas have their minima."""
    powers = sorted({power for by_power in losses.values() for power in by_power})
    carried = lowest(losses[min(losses)])
    rows = []
    for topk, by_power in losses.items():
        means = {power: mean(of_seeds) for power, of_seeds in by_power.items()}
        bests = [
            lr * 2.0 ** vertex(dict(zip(means, values, strict=True))) for values in zip(*by_power.values(), strict=True)
        ]
        row: Row = {"K": topk, **{str(power): loss for power, loss in means.items()}}
        row.update(best=lr * 2.0 ** vertex(means), least=min(bests), largest=max(bests))
        rows.append(row | {"cost": means[carried] - min(means.values())})
    columns = {str(power): f"lr {lr * 2.0**power:.3g}" for power in powers}
    columns.update(best="best lr", least="least of a seed", largest="largest", cost=f"lr {lr * 2.0**carried:.3g} costs")
    print(f"\n{gate} gates\n\n{table(rows, columns)}")
    variances = [variance(values) for by_power in losses.values() for values in by_power.values() if len(values) > 1]
    if variances:
        print(f"\nstandard deviation between seeds: {mean(variances) ** 0.5:.3f}")


PARTS = {"start": start, "trained": after_training, "transfer": transfer}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description="Measure how the output of a mixture of experts, and its best learning rate, depend on top-k."
    )
    result.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure [all]")
    result.add_argument("--topk", type=int, nargs="+", default=list(TOPK), help="K of start and trained [1 2 4 .. 64]")
    result.add_argument("--transfer-topk", type=int, nargs="+", default=list(TRANSFERRED), help="K of transfer [2 4 8]")
    result.add_argument("--sparsity", type=int, default=4, help="S: all experts over active ones [4]")
    result.add_argument("--width", type=int, default=64, help="hidden size w, a multiple of 16 [64]")
    result.add_argument("--iterations", type=int, default=100, help="of training, of 2048 tokens each [100]")
    result.add_argument("--lr", type=float, default=0.12, help="of trained, and from which transfer searches [0.12]")
    result.add_argument("--seeds", type=int, default=2, help="trainings of each model [2]")
    result.add_argument("--start-seeds", type=int, default=4, help="untrained models of each kind [4]")
    result.add_argument("--workers", type=int, default=2, help="processes of one thread [2]")
    result.add_argument("--quick", action="store_true", help="K 1 4 16, S 2, 4 iterations, few seeds, one process")
    result.add_argument("--output", default="runs/moe_granularity", help="folder of tables and picture")
    return result


def main(argv: list[str]) -> None:
    """Measure what is asked for."""
    options = parser().parse_args(argv)
    if options.quick:
        options.topk, options.sparsity, options.iterations = [1, 4, 16], 2, 4
        options.seeds, options.start_seeds, options.workers = 1, 2, 1
    options.topk, options.transfer_topk = sorted(set(options.topk)), sorted(set(options.transfer_topk))
    ffn = 4 * options.width
    for flag, sizes in (("--topk", options.topk), ("--transfer-topk", options.transfer_topk)):
        if len(sizes) < 2 or any(topk < 1 or ffn % topk for topk in sizes):
            raise UsageError(f"{flag} is {sizes}; give two or more that divide the FFN size {ffn}")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}")
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(options.workers, Path(folder))
        for part in (part for part in PARTS if part in options.parts):
            rows[part] = PARTS[part](options, runner)
            write(rows[part], output / f"{part}.csv")
    draw(rows, output / "granularity.png")
    print(f"\nwrote {', '.join(f'{part}.csv' for part in rows)} and granularity.png in {output}")


if __name__ == "__main__":
    run_command(main)
