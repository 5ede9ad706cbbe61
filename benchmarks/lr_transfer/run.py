"""Does one learning rate serve every width, depth, token budget and top-k? HyperP and three baselines, on real text.

Searches the best learning rate of each model on a grid of factors of sqrt(2) (``plan.py``), by the sweep of
``tools/sweep.py``: killed, it goes on where it was. Prints the tables of ``report.py``. The text is that of the
installed Python. The results are in the preset's CSV file beside this script, and what it holds is not measured again:
``--csv`` elsewhere measures all.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr_transfer.plan import PRESETS, Preset, methods, parts, spec
from benchmarks.lr_transfer.report import find, report
from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.data.indexed import check_prefix
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.scaling.spec import Spec
from megatron_hyperp.scaling.sweep import Sweep, trainer_command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 2048
# Memory that is freed stays with the process: on CPU, fresh pages cost a third of the time.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main(argv: list[str]) -> None:
    """Train what is not known yet, then print the tables."""
    options = _parse(argv)
    preset = PRESETS[options.preset]
    if options.seeds:
        preset = dataclasses.replace(preset, seeds=tuple(options.seeds))
    names = options.methods or list(preset.methods)
    for name in names:
        if name not in methods(preset) or methods(preset)[name].optimizer not in preset.starts:
            raise UsageError(f"--methods {name} is none of the preset's: {', '.join(preset.methods)}")
    table = Path(options.csv or RESULTS / f"{options.preset}.csv")
    if not options.report_only:
        _measure(options, preset, names, table)
    elif not table.exists():
        raise UsageError(f"there is no {table} to report; leave --report-only out to measure it")
    print(report(find(parts(preset, names), table)))


def _measure(options: argparse.Namespace, preset: Preset, names: Sequence[str], table: Path) -> None:
    folder = Path(options.output or Path("runs") / "lr_transfer" / options.preset)
    os.environ.update(MALLOC)
    data, tokenizer = prepare(folder / "data", preset)
    content = spec(preset, names, data=str(data), tokenizer=str(tokenizer))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    sweep = Sweep(
        Spec(content, source=str(folder / "sweep.yaml")),
        folder=folder / "runs",
        table=table,
        command=trainer_command(ROOT / "examples" / "pretrain_gpt.py"),
    )
    if sweep.run(workers=options.workers or preset.workers):
        _record(table.with_suffix(".yaml"), options.preset, preset.seeds, data)


def prepare(folder: Path, preset: Preset) -> tuple[Path, Path]:
    """Make the tokenizer and the corpus unless they are there; return the corpus' prefix and the tokenizer's path."""
    tokenizer, prefix = folder / "tokenizer.model", folder / "python"
    text = ["--python-corpus", "--max-bytes", preset.corpus]
    if not tokenizer.exists():
        _tool("train_tokenizer", *text, "--vocab-size", str(VOCABULARY), "--output", str(tokenizer.with_suffix("")))
    if not prefix.with_suffix(".idx").exists():
        _tool("preprocess_data", *text, "--tokenizer", str(tokenizer), "--output-prefix", str(prefix), "--overwrite")
    return prefix, tokenizer


def _tool(name: str, *words: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / "tools" / f"{name}.py"), *words], check=False)
    if result.returncode:
        raise UsageError(f"tools/{name}.py {shlex.join(words)} failed; mend what it says above")


def _record(path: Path, preset: str, seeds: Sequence[int], data: Path) -> None:
    """Write beside the table how it came about."""
    corpus = check_prefix(data)
    content = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/lr_transfer/run.py", *sys.argv[1:]]),
        "preset": preset,
        "seeds": list(seeds),
        "corpus": {"documents": corpus.num_documents, "tokens": corpus.num_tokens, "digest": corpus.digest[:16]},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "numpy", "sentencepiece", "megatron-hyperp")},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes [cpu]")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods [all of the preset]")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds [1234]")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="trainings at a time [of the preset]")
    parser.add_argument("--output", metavar="FOLDER", help="folder of data and runs [runs/lr_transfer/PRESET]")
    parser.add_argument("--csv", metavar="FILE", help="table of the results [results/PRESET.csv beside this script]")
    parser.add_argument("--report-only", action="store_true", help="print the tables of results that are there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
