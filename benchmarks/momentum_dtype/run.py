"""What rounding Muon's momentum to two bytes changes: bf16 against fp16 with one power of two for each matrix.

Trains examples/configs/quickstart.yaml, or a mixture of experts of that size, in one process on bytes of the installed
Python's text, keeps the momentum of every hidden matrix in each precision from the first step on, and compares what
Newton-Schulz makes of them; then the same for matrices of known spectra. --losses trains with what --momentum-dtype
offers and prints held-out losses.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_text
from benchmarks.momentum_dtype.measuring import ROUNDED, SPECTRA, Momenta, iteration_errors, spectrum_row
from megatron_hyperp import arguments, device
from megatron_hyperp.coefficients import SETS
from megatron_hyperp.config import Config
from megatron_hyperp.errors import run_command
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.text import aligned

ROOT = Path(__file__).resolve().parents[2]
BYTES = 256
MODELS = {"dense": "quickstart.yaml", "experts": "quickstart_moe.yaml"}
KINDS = {
    "linear_qkv": "attention, in",
    "linear_proj": "attention, out",
    "linear_fc1": "MLP, in",
    "linear_fc2": "MLP, out",
    "router": "router",
}
SIZES = ((256, 256), (128, 512))


def config_of(model: str, folder: Path, prefix: str, iterations: int, words: Sequence[str] = ()) -> Config:
    """Return the resolved config of a run on one rank that writes nothing."""
    flags = f"--config {ROOT}/examples/configs/{MODELS[model]} --data-path {prefix} --tokenizer-model null:{BYTES}"
    flags += f" --run-dir {folder} --train-iters {iterations} --quiet --stability-interval 0"
    config = arguments.parse([*flags.split(), "--vocab-size", str(BYTES), *words], description="")
    return config.resolve(tokenizer_vocab_size=BYTES)


def trainer_of(config: Config) -> Any:
    """Return the trainer of a run."""
    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training.loop import Trainer

    return Trainer(config, load_tokenizer(f"null:{BYTES}"), None)


def kind_of(name: str, parameter: torch.Tensor) -> str | None:
    """Return the kind of a hidden matrix, None for all else."""
    if parameter.ndim != 2 or ".layers." not in name:
        return None
    kind = next((label for word, label in KINDS.items() if f".{word}." in name), None)
    return kind and (f"expert's {kind}" if ".experts." in name else kind)


def watched_run(config: Config, every: int) -> dict[str, list[dict[str, float]]]:
    """Train; return what was measured at every ``every``-th step, by the kind of matrix."""
    trainer = trainer_of(config)
    named = [(name, p) for chunk in trainer.chunks for name, p in chunk.named_parameters()]
    matrices = [(kind, p) for name, p in named if (kind := kind_of(name, p))]
    momenta = [Momenta((p.shape[0], p.shape[1]), config.optimizer.muon_momentum) for _, p in matrices]
    rows: dict[str, list[dict[str, float]]] = {}
    take_step, clip, done = trainer.optimizer.step, config.optimizer.clip_grad, 0

    def step() -> Any:
        nonlocal done
        gradients = [p.main_grad.float().clone() for _, p in matrices]
        result = take_step()
        factor = min(1.0, clip / result[1]) if clip else 1.0
        for kept, gradient in zip(momenta, gradients, strict=True):
            kept.add(gradient * factor)
        done += 1
        if done % every == 0:
            for (kind, _), kept in zip(matrices, momenta, strict=True):
                rows.setdefault(kind, []).append(_measured(kept))
        return result

    trainer.optimizer.step = step
    trainer.train()
    _close(trainer)
    return rows


def _measured(kept: Momenta) -> dict[str, float]:
    exact = NewtonSchulz(dtype=torch.float32, form="standard")
    values = torch.linalg.svdvals(kept.updates["fp32"][0].double())
    found = {"spread": float(values[0] / values[len(values) // 2])}
    for name, (momentum, update) in kept.changes(exact).items():
        found |= {f"{name} momentum": momentum, f"{name} update": update}
    iteration = iteration_errors(kept.updates["fp32"], "quintic")
    return found | {f"{name} iteration": error for name, error in iteration.items()}


def _close(trainer: Any) -> None:
    from megatron.core import parallel_state

    trainer.close_reports()
    parallel_state.destroy_model_parallel()


def table_of_run(rows: dict[str, list[dict[str, float]]]) -> Iterable[list[str]]:
    """Yield the lines of a run's table: medians over layers and steps, and the largest changes of the update."""
    yield [
        "matrix",
        "s1/s_mid",
        "bf16: momentum",
        "update",
        "largest",
        "fp16: momentum",
        "update",
        "largest",
        "bf16/fp16",
    ]
    for kind in sorted(rows):
        columns = {name: [row[name] for row in rows[kind]] for name in rows[kind][0]}
        middle = {name: statistics.median(values) for name, values in columns.items()}
        line = [kind, f"{middle['spread']:.1f}"]
        for name in ROUNDED:
            line += [f"{middle[f'{name} momentum']:.2%}", f"{middle[f'{name} update']:.2%}"]
            line.append(f"{max(columns[f'{name} update']):.2%}")
        yield [*line, f"{middle['bf16 update'] / middle['fp16 update']:.1f}"]


def table_of_iteration(rows: dict[str, list[dict[str, float]]]) -> Iterable[list[str]]:
    """Yield what computing Newton-Schulz itself in two bytes changes, medians."""
    yield ["matrix", "in bf16", "in fp16"]
    for kind in sorted(rows):
        errors = [[row[f"{name} iteration"] for row in rows[kind]] for name in ("bf16", "fp16")]
        yield [kind, *(f"{statistics.median(values):.2%}" for values in errors)]


def table_of_spectra() -> Iterable[list[str]]:
    """Yield the lines of the table of known spectra."""
    yield ["singular values", "shape", "set", "bf16", "fp16", "bf16/fp16"]
    for spectrum in SPECTRA:
        for rows, columns in SIZES:
            for coefficients in SETS:
                found = spectrum_row(spectrum, rows, columns, coefficients)
                changes = [f"{found[name]:.2%}" for name in ROUNDED]
                ratio = f"{found['bf16'] / found['fp16']:.1f}"
                yield [spectrum, f"{rows} x {columns}", coefficients, *changes, ratio]


def losses(model: str, folder: Path, prefix: str, iterations: int, dtypes: Sequence[str], seeds: int) -> None:
    """Print held-out losses of runs that differ in --momentum-dtype and seed alone, a line for each dtype."""
    for dtype in dtypes:
        found = []
        for seed in range(seeds):
            words = f"--momentum-dtype {dtype} --seed {seed} --eval-interval {iterations} --eval-iters 20".split()
            trainer = trainer_of(config_of(model, folder, prefix, iterations, words))
            trainer.train()
            found.append(float(trainer.evaluate()))
            _close(trainer)
        cells = [dtype, *(f"{loss:.4f}" for loss in found), f"mean {statistics.mean(found):.4f}"]
        print("  ".join(cells), flush=True)


def main(argv: list[str]) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="that are trained [all]")
    parser.add_argument("--iterations", type=int, default=300, help="of each training [300]")
    parser.add_argument("--every", type=int, default=50, help="iterations between measurements [50]")
    parser.add_argument("--losses", nargs="+", metavar="DTYPE", help="print losses with these momenta instead")
    parser.add_argument("--seeds", type=int, default=3, help="of --losses [3]")
    options = parser.parse_args(argv)
    device.adapt_megatron()
    device.init_process_group(10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = write_text(folder, max_bytes=20_000_000)
        for model in options.models:
            (folder / model).mkdir()
            print(f"\n{model}, {options.iterations} iterations", flush=True)
            if options.losses:
                losses(model, folder / model, prefix, options.iterations, options.losses, options.seeds)
                continue
            words = ["--eval-interval", "0"]
            rows = watched_run(config_of(model, folder / model, prefix, options.iterations, words), options.every)
            print(*aligned(list(table_of_run(rows))), "", sep="\n", flush=True)
            print("Newton-Schulz itself", *aligned(list(table_of_iteration(rows))), sep="\n", flush=True)
    if not options.losses:
        print("\nknown spectra, rounded once", *aligned(list(table_of_spectra())), sep="\n")


if __name__ == "__main__":
    run_command(main)
