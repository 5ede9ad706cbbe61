"""The options by which the tools in ``tools/`` choose the documents they read."""

from __future__ import annotations

import argparse
import os
import re

from megatron_hyperp.data.corpus import PYTHON_SUFFIXES, Corpus, python_corpus_paths
from megatron_hyperp.data.formats import FORMATS
from megatron_hyperp.data.sources import AUTO, Source, Sources, find_sources
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import local_path


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose documents; :func:`corpus_from_arguments` reads them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        type=local_path,
        metavar="PATH",
        help="files, pipes and folders of text or of records (JSON lines, JSON, CSV, Parquet), also compressed (gzip, "
        "bzip2, xz, zstd); - is standard input. Their content decides how they are read",
    )
    source.add_argument(
        "--python-corpus",
        action="store_true",
        help="source and documentation of the running Python and its installed packages",
    )
    parser.add_argument(
        "--suffixes",
        nargs="+",
        metavar=".EXT",
        help="files taken from a folder, whether compressed or not (default: all), "
        f"or by --python-corpus (default {' '.join(PYTHON_SUFFIXES)})",
    )
    parser.add_argument(
        "--format",
        choices=(AUTO, *FORMATS),
        default=AUTO,
        help="read files and pipes in this format, and of a folder only the files in it (default: by their content)",
    )
    parser.add_argument(
        "--json-key", metavar="KEY", help="key (JSON) or column (CSV, Parquet) where a record holds its text [text]"
    )
    parser.add_argument(
        "--skip-bad-lines",
        type=whole_number,
        default=0,
        metavar="N",
        help="leave out up to N records without text or with broken text; one more is an error (default %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="read at most this much, decompressed, e.g. 20MB: the first of --input, or an even choice of "
        "--python-corpus",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="read at most this many documents")


def corpus_from_arguments(arguments: argparse.Namespace) -> Corpus:
    """Return the corpus that the options of :func:`add_corpus_arguments` choose.

    Raises:
        UsageError: when an input does not exist or is not text, an option has no effect on the inputs, or no file is
            left.
    """
    if arguments.python_corpus:
        sources = _python_sources(arguments)
    else:
        if arguments.suffixes and not any(map(os.path.isdir, arguments.input)):
            raise UsageError("--suffixes has no effect on single files; give a folder or leave it out")
        sources = find_sources(
            arguments.input,
            suffixes=arguments.suffixes or (),
            format=arguments.format,
            key=arguments.json_key or "text",
        )
    if arguments.json_key is not None and all(source.format == "text" for source in sources.read):
        raise UsageError(f"--json-key {arguments.json_key} has no effect on plain text; leave it out")
    key = arguments.json_key or "text"
    return Corpus(sources, key, arguments.max_bytes, arguments.limit, arguments.skip_bad_lines)


def _python_sources(arguments: argparse.Namespace) -> Sources:
    if arguments.format not in (AUTO, "text"):
        raise UsageError(f"--python-corpus is text; leave out --format {arguments.format}")
    suffixes = arguments.suffixes or PYTHON_SUFFIXES
    paths = python_corpus_paths(max_bytes=arguments.max_bytes, suffixes=suffixes)
    if not paths:
        raise UsageError("no file of the running Python is left; raise --max-bytes or name other --suffixes")
    return Sources([Source(path, "text", size=path.stat().st_size) for path in paths])


def parse_bytes(text: str) -> int:
    """Read a size such as ``4096``, ``20MB`` or ``1.5G`` (powers of 1000).

    Raises:
        argparse.ArgumentTypeError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 4096, 20MB or 1.5G, say")
    return size


def positive_int(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    """Read a whole number, 0 or more.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
