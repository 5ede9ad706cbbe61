"""Train a SentencePiece tokenizer that gives every text back exactly, and save it as PREFIX.model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from megatron_hyperp.data.arguments import add_corpus_arguments, corpus_from_arguments, positive_int
from megatron_hyperp.data.corpus import Corpus
from megatron_hyperp.data.tokenizer import MODEL_TYPES, load_tokenizer, train_sentencepiece
from megatron_hyperp.errors import run_command
from megatron_hyperp.files import local_path


class _Texts:
    """The texts of a corpus, counted while they are read."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.documents = 0
        self.text_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._corpus:
            self.documents += 1
            self.text_bytes += len(document.text.encode())
            yield document.text


def main(argv: list[str]) -> None:
    """Read the command line, train the tokenizer and print a summary."""
    arguments = _parse(argv)
    started = time.monotonic()
    corpus = corpus_from_arguments(arguments)
    print(corpus.sources.describe(), flush=True)
    texts = _Texts(corpus)
    path = train_sentencepiece(
        texts,
        arguments.output,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        character_coverage=arguments.character_coverage,
    )
    seconds = time.monotonic() - started
    print(corpus.counts.describe())
    print(
        f"{texts.documents:,} documents, {texts.text_bytes / 1e6:,.1f} MB of text\n"
        f"{load_tokenizer(path).vocab_size:,} tokens, {seconds:.1f} s\n"
        f"wrote {path}"
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=positive_int, required=True, metavar="N", help="number of tokens")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default %(default)s")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the characters with a token of their own; the rest are spelled in bytes (default %(default)s)",
    )
    parser.add_argument("--output", type=local_path, required=True, metavar="PREFIX", help="write PREFIX.model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
