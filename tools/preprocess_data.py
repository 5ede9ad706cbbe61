"""Tokenize documents into Megatron's indexed format: PREFIX.bin and PREFIX.idx."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_hyperp.data.arguments import add_corpus_arguments, corpus_from_arguments, positive_int
from megatron_hyperp.data.content import record
from megatron_hyperp.data.indexed import CorpusSummary, write_corpus
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import run_command
from megatron_hyperp.files import local_path


def main(argv: list[str]) -> None:
    """Read the command line, write the prefix and print a summary."""
    arguments = _parse(argv)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if tokenizer.adds_bos and not arguments.prepend_bos:
        print(
            f"note: {arguments.tokenizer} puts its beginning-of-sequence token before every text; documents are written"
            " without it, and exports of the model will leave it out too (--prepend-bos writes it)",
            file=sys.stderr,
        )
    corpus = corpus_from_arguments(arguments)
    print(corpus.sources.describe(), flush=True)
    summary = write_corpus(
        corpus,
        arguments.output_prefix,
        tokenizer,
        workers=arguments.workers,
        append_eod=arguments.append_eod,
        prepend_bos=arguments.prepend_bos,
        overwrite=arguments.overwrite,
        total_bytes=corpus.total_bytes,
    )
    record(arguments.output_prefix)
    print(corpus.counts.describe())
    print(_describe(summary))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    add_corpus_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=local_path,
        required=True,
        metavar="TOKENIZER",
        help="a SentencePiece model, a Hugging Face tokenizer.json, a folder with one of them, or null:VOCAB_SIZE for"
        " text of token ids",
    )
    parser.add_argument(
        "--output-prefix", type=local_path, required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes (default %(default)s)"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="begin each document with the beginning-of-sequence token; training, evaluation, generation and exports"
        " follow (default: no)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def _describe(summary: CorpusSummary) -> str:
    left_out = f" ({summary.empty:,} without text left out)" if summary.empty else ""
    megabytes = summary.text_bytes / 1e6
    return (
        f"{summary.documents:,} documents{left_out}, {summary.tokens:,} tokens, {megabytes:,.1f} MB of text, "
        f"{summary.tokens / summary.text_bytes:.3f} tokens per byte\n"
        f"{summary.seconds:.1f} s, {summary.documents / summary.seconds:,.0f} documents/s, "
        f"{megabytes / summary.seconds:,.1f} MB/s\n"
        f"wrote {' and '.join(map(str, summary.files))}"
    )


if __name__ == "__main__":
    run_command(main)
