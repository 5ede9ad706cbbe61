"""Readers of bytes under atheris, which keeps inputs that reach new code and changes those further.

    python -m tests.fuzz.coverage_guided --target idx --runs 100000

It stops at the first finding, and writes the input beside you (crash-...); put it into tests/fuzz/test_files.py as an
``@example`` when you mend it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# By name, before what is instrumented is imported.
TARGETS = ("idx", "npy", "values", "safetensors", "tokenizer", "tracker", "checksums", "metadata", "corpus", "yaml")
INSTRUMENTED = ["megatron_hyperp", "pickle", "json", "yaml", "zipfile"]


def main() -> int:
    """Fuzz one target; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--runs", type=int, default=100_000, help="executions [100000]")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so many; 0: after the runs [0]")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("error: atheris is not installed; pip install atheris, or use make test-fuzz", file=sys.stderr)
        return 2
    import atheris

    with ExitStack() as stack, instrumented(atheris):
        from tests.fuzz import inputs
        from tests.fuzz.profiles import run

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seeds = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valid, reader, refusals = target(options.target, inputs)
        (seeds / "valid").write_bytes(valid)
        words = [sys.argv[0], f"-runs={options.runs}", f"-max_total_time={options.seconds}", "-timeout=10"]
        # Megabytes: torch is most of what is resident.
        words += ["-rss_limit_mb=4096", "-max_len=4096", str(seeds)]
        started = time.monotonic()
        atheris.Setup(words, lambda data: run(options.target, reader, folder, data, refusals=refusals))
        print(f"target {options.target}, from {started:.0f} s", flush=True)
        atheris.Fuzz()
    return 0


@contextmanager
def instrumented(atheris: Any) -> Iterator[None]:
    """What is imported meanwhile tells the fuzzer which lines it runs; torch, which is not fuzzed, takes minutes."""
    import torch

    assert torch.__version__
    with atheris.instrument_imports(include=INSTRUMENTED):
        yield


def target(name: str, inputs: Any) -> tuple[bytes, Any, tuple[type[BaseException], ...]]:
    """A valid input, its reader, and how that may refuse others."""
    if name == "yaml":
        from megatron_hyperp import arguments
        from megatron_hyperp.errors import UsageError

        text = arguments.to_yaml(inputs.model_config(**inputs.TINY))
        return text.encode(), inputs.read_file("x.yaml", arguments.load_yaml), (UsageError,)
    valid, reader, refusals = inputs.FILES[name]
    return valid(), reader, refusals


if __name__ == "__main__":
    sys.exit(main())
