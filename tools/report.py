"""Draw one or more runs: loss, learning rate, gradient norm and radius drift over tokens, as a PNG."""

import argparse
import os
from pathlib import Path

from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.report import load_run, plot_runs, summarize


def main(argv: list[str]) -> None:
    """Read the runs, write the picture, print one line a run."""
    parser = argparse.ArgumentParser(description="Draw one or more runs over tokens, as a PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, the --run-dir of a training")
    parser.add_argument("--output", metavar="FILE", help="PNG to write [report.png in the first run's folder]")
    options = parser.parse_args(argv)
    runs = {os.path.normpath(run): load_run(run) for run in options.runs}
    output = Path(options.output or Path(options.runs[0]) / "report.png")
    try:
        plot_runs(runs, output)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{output} cannot be written ({error}); give --output a PNG file in a folder that can"
        ) from error
    for name, rows in runs.items():
        print(f"{name}: {summarize(rows)}")
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
