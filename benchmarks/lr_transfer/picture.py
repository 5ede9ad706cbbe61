"""Draw a run's results: along each axis, how far the best learning rate over its law lies from the base model's."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr_transfer.plan import AXES, PRESETS, parts
from benchmarks.lr_transfer.report import GRID_STEP, TITLES, Found, find, steps
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.scaling.plots import COLOURS, FORMATS, MARKERS, amount, logarithmic, panels, plain

RESULTS = Path(__file__).resolve().parent / "results"
# Shares of a step of an axis by which methods are moved aside, so that they do not cover each other.
ASIDE = 0.05
# Steps of the grid within which a learning rate is said to transfer.
BAND = 1.0


def draw(found: Sequence[Found], base: Mapping[str, int], output: Path) -> None:
    """Write a panel for each axis on which the base and another model have a best learning rate.

    Args:
        found: the models of all methods.
        base: value of each axis at the base model.
        output: a .png, .pdf or .svg file.

    Raises:
        UsageError: there is no such axis yet.
    """
    names = list(dict.fromkeys(entry.part.method for entry in found))
    shifts = {axis: {name: _shifts(found, name, axis, base[axis]) for name in names} for axis in AXES}
    drawn = [axis for axis in AXES if any(len(points) > 1 for points in shifts[axis].values())]
    if not drawn:
        raise UsageError("no axis has a best learning rate at its base and at another value; wait for more results")
    with panels(output, len(drawn)) as panel_axes:
        for panel, axis in zip(panel_axes, drawn, strict=True):
            _panel(panel, axis, shifts[axis])
        handles, labels = panel_axes[0].get_legend_handles_labels()
        panel_axes[0].figure.legend(handles, labels, loc="outside right upper")


def _shifts(found: Sequence[Found], method: str, axis: str, base: int) -> list[tuple[int, float, float]]:
    """Value, grid steps from the base and their standard error (0 if unknown), by increasing value."""
    own = {e.part.value: e.optimum for e in found if e.part.method == method and e.part.axis == axis and e.optimum}
    if base not in own:
        return []
    unit = math.log(GRID_STEP)
    return [(value, steps(own[value].lr, own[base].lr), (own[value].spread or 0.0) / unit) for value in sorted(own)]


def _panel(panel: Any, axis: str, shifts: Mapping[str, Sequence[tuple[int, float, float]]]) -> None:
    panel.axhspan(-BAND, BAND, color="0.93", zorder=0)
    panel.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    middle = (len(shifts) - 1) / 2
    for index, (method, points) in enumerate(shifts.items()):
        x = [value * 2 ** (ASIDE * (index - middle)) for value, _, _ in points]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        panel.errorbar(
            x, [y for _, y, _ in points], yerr=[e for _, _, e in points], elinewidth=0.8, label=method, **style
        )
    values = sorted({value for points in shifts.values() for value, _, _ in points})
    logarithmic(panel.xaxis, amount if axis == "tokens" else plain, values)
    panel.set_xlabel(TITLES[axis])
    panel.set_ylabel("shift of best lr / law\n(factors of √2)")
    panel.grid(visible=False, axis="x")


def main(argv: list[str]) -> None:
    """Read a preset's table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="whose results [cpu]")
    parser.add_argument("--csv", metavar="FILE", help="table of the results [results/PRESET.csv beside this script]")
    parser.add_argument("--output", metavar="FILE", help="picture: .png, .pdf or .svg [PRESET.png beside the table]")
    options = parser.parse_args(argv)
    preset = PRESETS[options.preset]
    table = Path(options.csv or RESULTS / f"{options.preset}.csv")
    output = Path(options.output or table.with_suffix(".png"))
    if not table.exists():
        raise UsageError(f"there is no {table} to draw; run.py beside this script measures it")
    if output.suffix not in FORMATS:
        raise UsageError(f"--output {output} must end in one of {', '.join(FORMATS)}")
    draw(find(parts(preset, preset.methods), table), preset.base, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
