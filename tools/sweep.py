"""Train a grid over learning rate, depth, tokens, optimizer or any other knob, and keep one CSV file of the results.

The sweep goes on where it was interrupted or killed; trainings that are in the CSV file are not repeated.
"""

import argparse
import shlex
from pathlib import Path

from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.scaling import slurm
from megatron_hyperp.scaling.spec import Spec
from megatron_hyperp.scaling.sweep import Sweep, trainer_command

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ENTRY = EXAMPLES / "pretrain_gpt.py"
TEMPLATE = EXAMPLES / "slurm" / "sweep.sbatch"


def main(argv: list[str]) -> None:
    """Read the sweep; list it, submit it, or train it."""
    options = _parse(argv)
    spec = Spec.read(options.spec)
    folder = Path(options.output or Path("runs") / "sweeps" / Path(options.spec).stem)
    table = Path(options.csv or folder / "results.csv")
    if options.task is not None and not 0 <= options.task < len(spec.series):
        raise UsageError(f"--task is {options.task}; {options.spec} has the tasks 0 to {len(spec.series) - 1}")
    if options.slurm or options.print_slurm:
        words = [str(Path(__file__).resolve()), options.spec, "--output", str(folder), "--csv", str(table)]
        name = Path(options.spec).stem
        array = slurm.array(spec, TEMPLATE, words, name=name, folder=folder, workers=options.workers)
        print(shlex.join(array) if options.print_slurm else f"{slurm.submit(array, folder)}; the results go to {table}")
        return
    sweep = Sweep(spec, folder=folder, table=table, command=trainer_command(ENTRY))
    if options.list:
        print(_listing(sweep))
        return
    if options.retry_failed:
        sweep.ledger.forget_failures()
    if options.task is None:
        sweep.run(workers=options.workers)
    else:
        sweep.run(workers=1, only=[spec.series[options.task]])
    print(f"wrote {table}")


def _listing(sweep: Sweep) -> str:
    lines = []
    for task, series in enumerate(sweep.spec.series):
        for point in sweep.wanted(series):
            result = sweep.ledger.known.get(point.key)
            told = f"{result.status} {result.text}" if result else "to train"
            lines.append(f"{task:4d}  {point.method}  {point.name}  {told}")
    return "\n".join(["task  method  run  result", *lines])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument(
        "spec",
        type=local_path,
        metavar="SPEC",
        help="YAML file, see megatron_hyperp/scaling/spec.py and examples/sweeps",
    )
    parser.add_argument(
        "--output", type=local_path, metavar="FOLDER", help="folder of the runs [runs/sweeps/NAME OF SPEC]"
    )
    parser.add_argument(
        "--csv", type=local_path, metavar="FILE", help="table of the results [results.csv in the output folder]"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=1, metavar="N", help="trainings, or tasks of the array, at a time [1]"
    )
    parser.add_argument("--retry-failed", action="store_true", help="train again what diverged or failed")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--list", action="store_true", help="print the trainings and what is known of them; train none")
    where.add_argument("--slurm", action="store_true", help="submit a job array, one task for each series of trainings")
    where.add_argument("--print-slurm", action="store_true", help="print the sbatch command that submits the array")
    where.add_argument("--task", type=int, metavar="INDEX", help="train one series: what a task of the array does")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
