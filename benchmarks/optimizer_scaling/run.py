"""Weak and strong scaling of the optimizer's step: predicted for 1,024 GPUs, and checked on ranks of this machine.

Predictions are those of the cost model that deals out the work. ``--measure`` takes steps of slices of the models:
FLOPs, bytes and collectives of the busiest rank must equal the predictions; times are compared with a model whose rates
are fitted to the steps of one and two ranks.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.optimizer_scaling.calibrating import calibrate
from benchmarks.optimizer_scaling.predicting import STRONG, STRONG_RANKS, Point, predicted, strong, weak
from benchmarks.optimizer_scaling.stepping import Case, Taken, take
from benchmarks.optimizer_step.slices import SLICES, Slice
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.planning.step import StepCost
from megatron_hyperp.text import aligned

# One layer and its part of the vocabulary for each rank.
WEAK = "d8 by ranks"
MODELS = (*SLICES, WEAK)
Found = tuple[Case, list[StepCost], Taken]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(description="Predict how the optimizer's step scales, or check it here.")
    result.add_argument("--models", nargs="+", choices=STRONG, default=STRONG, help="recipes to predict [all of these]")
    result.add_argument("--measure", type=int, nargs="+", metavar="RANKS", help="take steps on 1, 2, 4, 8, ... ranks")
    slices = f"with --measure: of {', '.join(MODELS)} [d8, moe-d8, {WEAK}]"
    result.add_argument("--slices", nargs="+", default=["d8", "moe-d8", WEAK], help=slices)
    result.add_argument("--repeats", type=int, default=5, help="of which the median counts; 0: only count [5]")
    result.add_argument("--port", default="29579", help="TCP port for the ranks [29579]")
    return result


def main(argv: list[str]) -> None:
    """Predict, or measure."""
    options = parser().parse_args(argv)
    if not options.measure:
        for title, points in predictions(options.models):
            print(f"{title}\n{point_table(points)}\n", flush=True)
        return
    found = measured(options.measure, options.slices, options.repeats, options.port)
    print(count_table(found))
    if options.repeats:
        print(f"\n{time_table(found, os.cpu_count() or 1)}")


def predictions(models: Sequence[str]) -> Iterator[tuple[str, list[Point]]]:
    """Yield titles and points."""
    for name in models:
        yield f"strong: {name}", strong(name, STRONG_RANKS)
    for kind in dict.fromkeys(name.partition("_")[0] for name in models):
        yield f"weak: {kind}_d8 to d24", weak(kind)


def point_table(points: Sequence[Point]) -> str:
    """Return a row for each point; efficiency, useful work over ranks and time, is relative to the first."""
    head = ("ranks", "N-S TFLOP", "of fair share", "GB sent", "collectives", "N-S ms", "update ms")
    rows: list[tuple[str, ...]] = [(*head, "exchange ms", "passes ms", "N-S efficiency")]
    for item in points:
        milliseconds = (item.newton_schulz, item.update, item.exchange, item.passes)
        rows.append(
            (
                str(item.ranks),
                f"{item.busiest / 1e12:.3f}",
                f"{item.busiest * item.ranks / item.work:.2f}",
                f"{item.sent / 1e9:.2f}",
                str(item.collectives),
                *(f"{1e3 * seconds:.2f}" for seconds in milliseconds),
                f"{item.efficiency / points[0].efficiency:.2f}",
            )
        )
    return "\n".join(aligned(rows, right=lambda column: True))


def cases_of(names: Sequence[str], ranks: int) -> list[Case]:
    """Return the slices on data-parallel ranks, and on pairs of tensor-parallel ones.

    Raises:
        UsageError: an unknown slice.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise UsageError(f"--slices {unknown[0]!r} is unknown; known are {', '.join(map(repr, MODELS))}")
    parts = {name: SLICES.get(name) or Slice(8, layers=ranks, vocabulary=1000 * ranks) for name in names}
    return [Case(name, part, size, ranks) for name, part in parts.items() for size in (1, 2) if ranks % size == 0]


def measured(ranks: Sequence[int], names: Sequence[str], repeats: int, port: str) -> list[Found]:
    """Take the steps, and see that they do what is predicted.

    Raises:
        AssertionError: a count differs.
    """
    found: list[Found] = []
    for number in ranks:
        cases = cases_of(names, number)
        for case, taken in zip(cases, take(cases, repeats, port), strict=True):
            costs = predicted(case)
            busiest = tuple(max(getattr(cost, name) for cost in costs) for name in ("flops", "sent", "collectives"))
            counts = (taken.flops, taken.sent, taken.collectives)
            if any(abs(one - other) > 1e-9 * one for one, other in zip(busiest, counts, strict=True)):
                raise AssertionError(f"{case.title}, {case.layout}: predicted {busiest}, counted {counts}")
            found.append((case, costs, taken))
    return found


def count_table(found: Sequence[Found]) -> str:
    """Return what the busiest rank does, as predicted and as counted."""
    rows: list[tuple[str, ...]] = [("slice", "ranks", "layout", "N-S GFLOP", "MB sent", "collectives")]
    for case, _, taken in found:
        counts = (f"{taken.flops / 1e9:.3f}", f"{taken.sent / 1e6:.3f}", str(taken.collectives))
        rows.append((case.title, str(case.ranks), case.layout, *counts))
    return "\n".join([*aligned(rows, right=lambda column: column > 2), f"{len(found)} cases: counted as predicted"])


def time_table(found: Sequence[Found], cores: int) -> str:
    """Return milliseconds, measured and by rates that are fitted to one and two ranks.

    Raises:
        UsageError: there are no steps of one rank or of two.
    """
    by_ranks = {
        number: [(costs, taken.seconds) for case, costs, taken in found if case.ranks == number] for number in (1, 2)
    }
    if not all(by_ranks.values()):
        raise UsageError("times are fitted to steps of 1 and 2 ranks; give --measure 1 2 ..., or --repeats 0")
    rates = calibrate(by_ranks[1], by_ranks[2])
    rows: list[tuple[str, ...]] = [("slice", "ranks", "layout", "measured ms", "predicted ms", "measured/predicted")]
    for case, costs, taken in found:
        seconds = rates.step(costs, cores)
        times = (f"{1e3 * taken.seconds:.1f}", f"{1e3 * seconds:.1f}", f"{taken.seconds / seconds:.2f}")
        rows.append((case.title, str(case.ranks), case.layout, *times))
    units = {"GFLOP/s": rates.flop * 1e9, "GB/s touched": rates.touched * 1e9, "GB/s sent": rates.sent * 1e9}
    said = [f"{1 / unit:.1f} {name}" for name, unit in units.items() if unit]
    line = f"{cores} cores; fitted to 1 and 2 ranks: {', '.join(said)}, {1e3 * rates.collective:.2f} ms a collective"
    return "\n".join([line, *aligned(rows, right=lambda column: column > 2)])


if __name__ == "__main__":
    run_command(main)
