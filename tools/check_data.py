"""Check that corpora are whole and what was written: sizes, order of the sequences, checksums."""

from __future__ import annotations

import argparse

from megatron_hyperp.data.content import check_content, record
from megatron_hyperp.data.indexed import check_prefix
from megatron_hyperp.errors import run_command
from megatron_hyperp.files import local_path


def main(argv: list[str]) -> None:
    """Check each prefix; the first that is damaged ends this with a line and exit code 2."""
    options = _parse(argv)
    for prefix in options.prefix:
        corpus = check_prefix(prefix)
        if options.record:
            record(prefix)
        known = check_content(prefix)
        verdict = "as written" if known else "whole, but nobody took its checksums (--record does)"
        print(f"{prefix}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens, {verdict}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("prefix", nargs="+", type=local_path, metavar="PREFIX", help="of a .bin and an .idx")
    parser.add_argument("--record", action="store_true", help="take the checksums of what is there now")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
