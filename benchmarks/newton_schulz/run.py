"""Print the table of docs/newton-schulz.md: what each coefficient set makes of singular values, and its rounding."""

import sys
from pathlib import Path

import torch

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.newton_schulz.matrices import error, exact, with_spectrum
from megatron_hyperp.coefficients import SETS
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.restarts import SPECTRA

ROWS, COLUMNS = 64, 192
HEAD = (
    *("set", "steps", "singular values from 1/k; 1/k^2; 10^0 to 10^-4", "restarts fp32; fp16"),
    *("fp32 standard", "fp32 Gram", "fp16 standard", "fp16 Gram", "bf16 standard"),
)


def restarts(name: str, dtype: torch.dtype) -> str:
    """Steps after which the Gram form restarts."""
    segments = NewtonSchulz(coefficients=name, steps=SETS[name].steps, dtype=dtype).segments
    ends = [sum(map(len, segments[: count + 1])) for count in range(len(segments) - 1)]
    return ", ".join(map(str, ends)) or "none"


def row(name: str) -> list[str]:
    """What a set does in the steps that it is made for."""
    matrices = [with_spectrum(spectrum, ROWS, COLUMNS) for spectrum in SPECTRA]
    values = [torch.linalg.svdvals(exact(x, name)) for x in matrices]
    ranges = "; ".join(f"{float(found.min()):.2g} to {float(found.max()):.3g}" for found in values)
    errors = [
        f"{max(error(x, name, dtype, form) for x in matrices):.1e}"
        for dtype, form in (
            *((torch.float32, "standard"), (torch.float32, "gram"), (torch.float16, "standard")),
            *((torch.float16, "gram"), (torch.bfloat16, "standard")),
        )
    ]
    cuts = "; ".join(restarts(name, dtype) for dtype in (torch.float32, torch.float16))
    return [name, str(SETS[name].steps), ranges, cuts, *errors]


def table() -> str:
    """Return the table as Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(name) for name in SETS)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        print(f"usage: python benchmarks/newton_schulz/run.py\n\n{__doc__}")
        return
    print(table())


if __name__ == "__main__":
    main()
