"""Report one or more runs side by side: one HTML page that needs nothing else, and PNGs of its main panels."""

import argparse
from pathlib import Path

from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.reporting.page import write
from megatron_hyperp.reporting.runs import load_runs, summarize

NAME = "report.html"


def destination(output: str | None, first_run: str) -> Path:
    """Return the HTML file to write.

    Raises:
        UsageError: the output is a file of another kind.
    """
    if output is None:
        return Path(first_run) / NAME
    path = Path(output)
    if path.is_dir() or not path.suffix:
        return path / NAME
    if path.suffix != ".html":
        raise UsageError(
            f"--output is {output}; give a folder, or a file that ends in .html (PNGs are written beside it)"
        )
    return path


def main(argv: list[str]) -> None:
    """Read the runs, write the page and the pictures, print one line a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="run folder, the --run-dir of a training"
    )
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FOLDER_OR_HTML",
        help=f"folder for {NAME}, or an .html file [the first run's folder]",
    )
    options = parser.parse_args(argv)
    output = destination(options.output, options.runs[0])
    runs = load_runs(options.runs)
    try:
        files = write(runs, output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror}); give --output a place that can") from error
    for run in runs:
        print(f"{run.name}: {summarize(run)}")
    print(f"wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    run_command(main)
