"""Fit scaling laws to the runs of a CSV file.

lr: the best learning rate of each model, by a parabola in log lr, beside what the transfer law makes of the base's.
tokens: the exponent x of eta*(T) ~ T^-x for each model, beside the paper's 0.32.
flops: L = A F^-b + C of each method's best losses.
leverage: FLOPs that the baseline needs for a method's loss, over those that the method used.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_hyperp import transfer
from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.scaling import analysis, plots, tables
from megatron_hyperp.scaling.groups import Group, group_runs, matching, read_runs

# Flags that only some of the fits take notice of.
ONLY = {
    "base": "lr",
    "batch_tokens": "lr",
    "hidden_size": "lr",
    "lr_preset": "lr",
    "token_exponent": "lr",
    "write_base": "lr",
    "baseline": "leverage",
}
EPILOG = """\
CSV: a line of names, then a line for each run, with the columns method, depth, tokens, flops, lr, loss. Further ones
may follow, such as hidden_size, moe_topk, seed, run, or status (finished, diverged, failed): tools/sweep.py writes such
files. Runs are compared that differ in lr and seed alone.

JSON: {"fit", "csv", "results": [...]}; a number that is not known is null, and so is "refused" where there is a result.
  lr        group, runs, lr, lr_spread (standard error of ln lr), loss, law (lr by the law), ratio (lr / law), refused;
            beside the results: bases {method: group}, token_exponent
  tokens    model, method, points [{tokens, lr}], exponent, spread (standard error), paper, refused
  flops     method, points [{flops, loss}], at_edge (groups whose best lr is at the edge of its grid), A, b, C,
            spread_log_A, spread_b, spread_C (standard errors), refused
  leverage  method, flops, loss, leverage, fitted (leverage of the method's own law), baseline_flops,
            extrapolation (factor outside the baseline's FLOPs), refused; beside the results: baseline

--debug shows the traceback of an error."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fit found.

    Attributes:
        table: to read.
        document: for JSON.
        refusals: of each result; empty strings for those that are none.
        draw: writes the picture.
        bases: of each method, for lr.
    """

    table: str
    document: dict[str, Any]
    refusals: list[str]
    draw: Callable[[Path], None]
    bases: dict[str, analysis.Base] = field(default_factory=dict)


def main(argv: list[str]) -> None:
    """Read the file, fit, print a table or JSON; draw, and write the base, where asked to."""
    options = _parse(argv)
    groups = group_runs(matching(read_runs(options.csv), options.where), options.ignore)
    outcome = {"lr": _lr, "tokens": _tokens, "flops": _flops, "leverage": _leverage}[options.fit](options, groups)
    head = {"fit": options.fit, "csv": options.csv}
    print(json.dumps(head | outcome.document, indent=2) if options.json else outcome.table, flush=True)
    if all(outcome.refusals):
        raise UsageError(f"{options.csv} allows no fit; of the first of {len(outcome.refusals)}: {outcome.refusals[0]}")
    written = []
    if options.plot:
        written.append(_written(options.plot, "--plot", outcome.draw))
    if options.write_base:
        text = _base_text(options, outcome.bases)
        written.append(_written(options.write_base, "--write-base", lambda path: _write(path, text)))
    if written and not options.json:
        print("\n".join(f"wrote {path}" for path in written))


def _lr(options: argparse.Namespace, groups: Sequence[Group]) -> Outcome:
    tuned = analysis.tune(groups)
    exponent = _exponent(options.token_exponent, tuned)
    bases = analysis.find_bases(tuned, options.base, exponent, options.lr_preset or "paper")
    replaced = {analysis.preset_of(base.group, base.preset) for base in bases.values()} - {"paper"}
    if replaced and options.token_exponent is not None:
        names = ", ".join(sorted(replaced))
        raise UsageError(f"--token-exponent is of the paper's law, and {names} has its own; leave one of them out")
    document = {
        "bases": {method: base.group.key for method, base in bases.items()},
        "token_exponent": exponent,
        "results": tables.lr_results(tuned, bases),
    }
    refusals = [entry.refusal for entry in tuned]
    return Outcome(
        tables.lr_table(tuned, bases), document, refusals, lambda path: plots.learning_rates(tuned, path), bases
    )


def _exponent(given: str | None, tuned: Sequence[analysis.Tuned]) -> float:
    """The exponent of the tokens in the law: the paper's, a number, or fitted."""
    if given is None:
        return transfer.TOKEN_EXPONENT
    if given == "fit":
        fits = analysis.token_fits(tuned)
        fitted = [fit.exponent.value for fit in fits if fit.exponent]
        if len(fitted) == 1:
            return fitted[0]
        names = "; ".join(fit.name for fit in fits) or "none"
        raise UsageError(
            "--token-exponent fit takes one model that is tuned at two or more numbers of tokens, and"
            f" {len(fitted)} are, of: {names}; choose by --where, or give a number"
        )
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"--token-exponent is {given!r}; give a number of at least 0, or fit")
    return value


def _tokens(options: argparse.Namespace, groups: Sequence[Group]) -> Outcome:
    fits = analysis.token_fits(analysis.tune(groups))
    if not fits:
        raise UsageError(
            f"{options.csv} has no model with two numbers of tokens; its groups are"
            f" {'; '.join(group.name() for group in groups)} (--ignore takes a column out of what sets them apart)"
        )
    document = {"results": tables.token_results(fits)}
    refusals = [fit.refusal for fit in fits]
    return Outcome(tables.token_table(fits), document, refusals, lambda path: plots.token_exponents(fits, path))


def _flops(options: argparse.Namespace, groups: Sequence[Group]) -> Outcome:
    fits = analysis.loss_fits(groups)
    document = {"results": tables.loss_results(fits)}
    return Outcome(
        tables.loss_table(fits), document, [fit.refusal for fit in fits], lambda path: plots.losses(fits, path)
    )


def _leverage(options: argparse.Namespace, groups: Sequence[Group]) -> Outcome:
    fits = analysis.loss_fits(groups)
    if options.baseline is None:
        raise UsageError(f"leverage needs a --baseline, one of {', '.join(fit.method for fit in fits)}")
    points = analysis.leverages(fits, options.baseline)
    document = {"baseline": options.baseline, "results": tables.leverage_results(points)}
    return Outcome(
        tables.leverage_table(points, options.baseline),
        document,
        [point.refusal for point in points],
        lambda path: plots.leverages(points, options.baseline, path),
    )


def _base_text(options: argparse.Namespace, bases: dict[str, analysis.Base]) -> str:
    if len(bases) != 1:
        there = ", ".join(bases) or "none"
        raise UsageError(
            f"--write-base writes the base of one method, and there are {there}; choose by --where method="
        )
    (base,) = bases.values()
    return analysis.base_yaml(
        base,
        source=options.csv,
        batch=options.batch_tokens,
        hidden_size=options.hidden_size,
        with_exponent=options.token_exponent is not None,
    )


def _written(path: str, flag: str, write: Callable[[Path], None]) -> str:
    try:
        write(Path(path))
    except OSError as error:
        raise UsageError(
            f"{flag} {path} cannot be written ({error.strerror}); give a file in a folder that can"
        ) from error
    return path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("fit", choices=("lr", "tokens", "flops", "leverage"), help="what to fit")
    parser.add_argument("--csv", type=local_path, required=True, metavar="FILE", help="the runs")
    parser.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help="take these runs alone"
    )
    parser.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns that set no models apart"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, see below")
    parser.add_argument("--plot", type=local_path, metavar="FILE", help="draw: a .png, .pdf or .svg file")
    parser.add_argument(
        "--base",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN=VALUE",
        help="lr: the group from which the law starts [of each method, the one of the fewest FLOPs]",
    )
    parser.add_argument(
        "--lr-preset",
        choices=list(transfer.PRESETS),
        help="lr: law in place of that of the optimizer's recipe [column lr_preset; else paper]",
    )
    parser.add_argument("--token-exponent", metavar="X|fit", help="lr: exponent of the tokens in the law [0.32]")
    parser.add_argument(
        "--write-base",
        type=local_path,
        metavar="FILE",
        help="lr: write the base as YAML; the trainer's --config takes it after a model's",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        help="lr: tokens per batch of the base [column batch_tokens, or global_batch_size x seq_length]",
    )
    parser.add_argument(
        "--hidden-size", type=positive_int, metavar="N", help="lr: width of the base [column hidden_size]"
    )
    parser.add_argument("--baseline", metavar="METHOD", help="leverage: the method to compare with")
    options = parser.parse_args(argv)
    for name, fit in ONLY.items():
        if getattr(options, name) and options.fit != fit:
            raise UsageError(f"--{name.replace('_', '-')} has no effect on {options.fit}, only on {fit}; leave it out")
    for name in ("batch_tokens", "hidden_size"):
        if getattr(options, name) and not options.write_base:
            raise UsageError(
                f"--{name.replace('_', '-')} goes into the file of --write-base; give that, or leave it out"
            )
    if options.plot and Path(options.plot).suffix not in plots.FORMATS:
        raise UsageError(f"--plot {options.plot} must end in one of {', '.join(plots.FORMATS)}")
    return options


if __name__ == "__main__":
    run_command(main)
