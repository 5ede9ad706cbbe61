"""The options by which the tools in ``tools/`` choose the documents they read."""

from __future__ import annotations

import argparse
import os
import re

from megatron_hyperp.data.corpus import (
    FOLDER_SUFFIXES,
    JSON_LINES_SUFFIXES,
    PYTHON_SUFFIXES,
    Corpus,
    find_files,
    python_corpus_paths,
)
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import local_path


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose documents; :func:`corpus_from_arguments` reads them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", type=local_path, metavar="PATH", help="text files, JSON-lines files and folders of them"
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
        help=f"files taken from a folder (default {' '.join(FOLDER_SUFFIXES)}) "
        f"or by --python-corpus (default {' '.join(PYTHON_SUFFIXES)})",
    )
    parser.add_argument("--json-key", metavar="KEY", help="where a JSON line holds its text (default text)")
    parser.add_argument(
        "--max-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="read at most this much, e.g. 20MB: the first of --input, or an even choice of --python-corpus",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="read at most this many documents")


def corpus_from_arguments(arguments: argparse.Namespace) -> Corpus:
    """Return the corpus that the options of :func:`add_corpus_arguments` choose.

    Raises:
        UsageError: when an input does not exist, an option has no effect on the inputs, or no file is left.
    """
    folders = arguments.python_corpus or any(map(os.path.isdir, arguments.input))
    if arguments.suffixes and not folders:
        raise UsageError("--suffixes has no effect on single files; give a folder or leave it out")
    if arguments.python_corpus:
        paths = python_corpus_paths(max_bytes=arguments.max_bytes, suffixes=arguments.suffixes or PYTHON_SUFFIXES)
    else:
        paths = find_files(arguments.input, arguments.suffixes or FOLDER_SUFFIXES)
    if not paths:
        raise UsageError("no file of the running Python is left; raise --max-bytes or name other --suffixes")
    if arguments.json_key is not None and not any(path.suffix in JSON_LINES_SUFFIXES for path in paths):
        raise UsageError(f"--json-key {arguments.json_key} has no effect without a JSON-lines file; leave it out")
    return Corpus(paths, arguments.json_key or "text", arguments.max_bytes, arguments.limit)


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
