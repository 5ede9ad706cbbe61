"""Documents to tokens, in one process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 2**18


class EncodedBatch(NamedTuple):
    """Some documents in tokens.

    Attributes:
        documents: the token ids of each.
        empty: number of documents without text, which are left out.
        text_bytes: size of the text in UTF-8.
        source_bytes: the bytes of input that were read.
    """

    documents: list[NDArray[np.int32]]
    empty: int
    text_bytes: int
    source_bytes: int


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, *, append_eod: bool, prepend_bos: bool, workers: int
) -> Iterator[EncodedBatch]:
    """Encode documents in the order given, with few of them in memory at a time.

    Args:
        documents: the documents.
        tokenizer: it encodes the text.
        append_eod: end each document with the end-of-document token.
        prepend_bos: begin each document with the beginning-of-sequence token.
        workers: number of processes; 1 encodes in this process. The tokens are the same.

    Raises:
        UsageError: the tokenizer has no beginning-of-sequence token to begin documents with.
    """
    start = tokenizer.document_start(prepend_bos=prepend_bos)
    end = [tokenizer.eod] if append_eod else []
    encoder, batches = _Encoder(tokenizer, start, end), _batches(documents)
    if workers == 1:
        yield from map(encoder, batches)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    start: list[int]
    end: list[int]

    def __call__(self, batch: list[Document]) -> EncodedBatch:
        encoded = [self.tokenizer.encode(document.text) for document in batch]
        documents = [np.array(self.start + ids + self.end, dtype=np.int32) for ids in encoded if ids]
        return EncodedBatch(
            documents=documents,
            empty=len(batch) - len(documents),
            text_bytes=sum(len(document.text.encode()) for document in batch),
            source_bytes=sum(document.source_bytes for document in batch),
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches worth sending to another process."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # An interrupt from the keyboard reaches the parent as well, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent dies: a killed parent cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: list[Document]) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder(batch)
