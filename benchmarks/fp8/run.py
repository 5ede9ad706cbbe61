"""Does FP8 learn as well, and what does the sphere give it? The quickstart's model under every recipe, on one CPU core.

Trains what the CSV files beside this script do not hold yet, so that it goes on where it was killed; ``--output``
elsewhere measures all. Prints final losses beside those without FP8, drift of radii, and what rounding to e4m3 does to
trained weights under current scales and under those that follow from the radius.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.fp8.training import CASES, Row, start, train
from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN = "none"
# What identifies a training.
KEY = ("case", "precision", "seed", "iterations")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(path: Path, rows: Sequence[Row]) -> None:
    """Write rows behind those of a CSV file, in place of any of the same training."""
    added = {tuple(str(row[name]) for name in KEY) for row in rows}
    kept = [row for row in read(path) if tuple(row[name] for name in KEY) not in added]
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_atomically(path, content.getvalue())


def measure(options: argparse.Namespace, losses: Path, weights: Path) -> None:
    """Train what is wanted and not known; those without FP8 first."""
    known = {tuple(row[name] for name in KEY) for row in read(losses)}
    wanted = [
        (case, precision, seed) for precision in options.precision for seed in options.seeds for case in options.cases
    ]
    missing = [work for work in wanted if (*map(str, work), str(options.iterations)) not in known]
    if not missing:
        return
    if not options.data_path or not options.tokenizer_model:
        raise UsageError(
            f"{len(missing)} trainings are not in {losses}; give --data-path and --tokenizer-model, such as those of"
            " examples/quickstart.sh"
        )
    start()
    for case, precision, seed in missing:
        result, errors = train(
            case,
            bf16=precision == "bf16",
            iterations=options.iterations,
            seed=seed,
            data_path=options.data_path,
            tokenizer_model=options.tokenizer_model,
        )
        append(weights, errors)
        # Last: this is what says that the training is done.
        append(losses, [result])


def report(options: argparse.Namespace, losses: Path, weights: Path) -> str:
    """Return the tables of what is known, in Markdown."""
    blocks = []
    for precision in options.precision:
        for seed in options.seeds:
            mine = {
                row["case"]: row
                for row in read(losses)
                if (row["precision"], row["seed"], row["iterations"]) == (precision, str(seed), str(options.iterations))
            }
            known = [mine[case] for case in options.cases if case in mine]
            if PLAIN in mine:
                blocks.append(f"{precision}, seed {seed}\n\n{loss_table(known, mine[PLAIN])}")
            errors = [row for row in read(weights) if all(row[name] == mine.get(PLAIN, {}).get(name) for name in KEY)]
            if errors:
                blocks.append(f"weights trained without FP8, {precision}, seed {seed}\n\n{weight_table(errors)}")
    return "\n\n".join(blocks)


def loss_table(rows: Sequence[dict[str, str]], plain: dict[str, str]) -> str:
    """Losses of trainings, and their ratios to those without FP8."""
    lines = ["| FP8 | loss | ratio | held-out loss | ratio | radius drift |", "|---|---|---|---|---|---|"]
    for row in rows:
        loss, held_out = float(row["loss"]), float(row["held_out"])
        ratios = loss / float(plain["loss"]), held_out / float(plain["held_out"])
        drift = float(row["radius_drift"])
        lines.append(
            f"| {row['case']} | {loss:.4f} | {ratios[0]:.4f} | {held_out:.4f} | {ratios[1]:.4f} | {drift:.1e} |"
        )
    return "\n".join(lines)


def weight_table(rows: Sequence[dict[str, str]]) -> str:
    """What rounding does to each kind of matrix."""
    lines = [
        "| matrices | error, current | error, sphere | ratio | clipped by sphere | largest / RMS |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        current, sphere = float(row["current"]), float(row["sphere"])
        lines.append(
            f"| {row['kind']} | {current:.3%} | {sphere:.3%} | {sphere / current:.3f} | {float(row['clipped']):.1%} |"
            f" {float(row['largest']):.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Train what is not known yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--data-path", metavar="PREFIX", help="corpus, such as runs/quickstart/data/python")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="its tokenizer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="[all]")
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="of all that is not FP8 [bf16]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234], metavar="N", help="[1234]")
    parser.add_argument("--iterations", type=positive_int, default=200, metavar="N", help="[200]")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="of the CSV files [results]")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    losses, weights = options.output / "losses.csv", options.output / "weights.csv"
    measure(options, losses, weights)
    print(f"torch {torch.__version__}\n\n{report(options, losses, weights)}")


if __name__ == "__main__":
    run_command(main)
