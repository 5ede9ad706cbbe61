"""Megatron's datasets: blends of indexed corpora, split, sampled in a fixed order."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from numpy.lib import format as npy_format

from megatron_hyperp import checksums
from megatron_hyperp.data.batches import SampleDataset
from megatron_hyperp.data.indexed import PrefixInfo, check_prefix, check_vocabulary
from megatron_hyperp.data.tokenizer import Tokenizer
from megatron_hyperp.errors import UsageError

# Names of a split's parts in flags, and in messages with what helps where a part has no sample.
PARTS = ("train", "valid", "test")
_NAMES = ("training", "validation", "test")
_NO_SAMPLE = "give it a larger share in --split, such as 99,1,0, a longer corpus or a shorter --seq-length"
_REMEDIES = (_NO_SAMPLE, f"{_NO_SAMPLE}, or train without validation: --eval-interval 0")
_MEGATRON_SURPLUS = 0.005


class Datasets(NamedTuple):
    """The datasets of a run; None for a split of which no samples were asked for."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


def parse_blend(data_path: Sequence[str]) -> list[tuple[float | None, str]]:
    """Read a data path: ``PREFIX``, ``PREFIX PREFIX ...`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``.

    Returns:
        A weight and a prefix for each corpus. The weight is None where none is given: the corpus then counts by its
        number of tokens.

    Raises:
        UsageError: when there is no prefix, only some prefixes have a weight, or a weight is not a number above 0.
    """
    words = [word.strip() for word in data_path]
    weights = [_parse_weight(word) for word in words]
    if not words or "" in words:
        raise UsageError(
            f"data path {list(data_path)} names no corpus; give PREFIX or WEIGHT PREFIX pairs", same_on_all_ranks=True
        )
    if all(weight is None for weight in weights):
        return [(None, word) for word in words]
    pairs = list(zip(weights[::2], words[1::2], strict=False))
    alternating = all(weight is not None for weight in weights[::2]) and not any(
        weight is not None for weight in weights[1::2]
    )
    if len(words) % 2 or not alternating:
        raise UsageError(
            f"data path {' '.join(words)!r} mixes weights and prefixes; give every prefix a weight before it, or none "
            "(write a prefix that is a number as ./NUMBER)",
            same_on_all_ranks=True,
        )
    for weight, prefix in pairs:
        if weight is None or not 0 < weight < math.inf:
            raise UsageError(
                f"data path weight {weight} of {prefix} is out of range; give a number above 0", same_on_all_ranks=True
            )
    return pairs


def build_datasets(
    *,
    data_path: Sequence[str],
    split: str,
    seq_length: int,
    seed: int,
    num_samples: tuple[int, int, int],
    tokenizer: Tokenizer,
    cache_path: str | os.PathLike[str] | None = None,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
    create_attention_mask: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Datasets:
    """Build the training, validation and test datasets.

    With ``torch.distributed`` initialised all ranks must call this: rank 0 builds the sample indices and saves them in
    the cache, which the other ranks read, so the cache must be on a file system that all ranks see. The samples of
    several epochs are shuffled together, so their order depends on ``num_samples``: ask for the same number when a run
    is resumed.

    Args:
        data_path: see :func:`parse_blend`.
        split: shares of the documents that go to training, validation and test, such as ``"99,1,0"``.
        seq_length: tokens per sample; a sample reads one more for its labels.
        seed: of the order of documents and samples.
        num_samples: samples to draw for training, validation and test, in as many epochs as that takes; of a split
            with 0 no dataset is built, nor of a test share without a sample.
        tokenizer: the one that the corpora were made with.
        cache_path: folder of the sample indices; a folder named as the first prefix with ``-cache`` by default.
        reset_position_ids: count positions from the beginning of each document.
        reset_attention_mask: let no token attend to an earlier document; needs ``create_attention_mask``.
        eod_mask_loss: give end-of-document tokens in the input no loss.
        create_attention_mask: put a Boolean mask ``[1, seq_length, seq_length]``, true where a token must not look,
            into every sample.
        note: receives a line when a test share has no sample.

    Returns:
        Datasets whose items are dictionaries of ``tokens``, ``labels``, ``position_ids`` (int64), ``loss_mask``
        (float32), each ``[seq_length]``, and ``attention_mask`` if asked for.

    Raises:
        UsageError: when a prefix is damaged or of another vocabulary (see :func:`check_prefix`,
            :func:`check_vocabulary`), the training or validation share has no sample, or the cache cannot be written.
    """
    if reset_attention_mask and not create_attention_mask:
        raise UsageError("reset_attention_mask changes a mask that is not made; set create_attention_mask as well")
    blend = parse_blend(data_path)
    infos = [check_prefix(prefix) for _, prefix in blend]
    check_shares(split, infos, seq_length, num_samples)
    cache = _cache_folder(cache_path, infos)
    if _rank() == 0:
        for info in infos:
            check_vocabulary(info.prefix, tokenizer.vocab_size)
    weights = [
        float(info.num_tokens) if weight is None else weight for (weight, _), info in zip(blend, infos, strict=True)
    ]

    def build(wanted: tuple[int, int, int]) -> list[SampleDataset | None]:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            # Megatron blends no single corpus.
            blend=([info.prefix for info in infos], weights if len(weights) > 1 else None),
            split=split,
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            mid_level_dataset_surplus=_surplus(weights, wanted),
            reset_position_ids=reset_position_ids,
            reset_attention_mask=reset_attention_mask,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=create_attention_mask,
        )
        # Megatron would loop forever over a split without tokens, even if no sample of it is asked for.
        config.split_matrix = [share if size else None for share, size in zip(config.split_matrix, wanted, strict=True)]
        return _build(config, wanted)

    with _held_cache(cache):
        train, valid, _ = build((*num_samples[:2], 0))
        test = None
        # Separately: a blend's surplus, and with it the order of samples, depends on all sizes of one build.
        if num_samples[2] and (share := _share(split, 2)) is not None:
            shortage = _shortage(share, infos, seq_length, "test")
            if shortage is None:
                *_, test = build((0, 0, num_samples[2]))
            else:
                note(f"no evaluation on the test set: {shortage}")
        return Datasets(train, valid, test)


def _build(config: GPTDatasetConfig, num_samples: tuple[int, int, int]) -> list[SampleDataset | None]:
    builder = BlendedMegatronDatasetBuilder if torch.distributed.is_initialized() else _SingleProcessBuilder
    try:
        with _quiet_megatron():
            datasets: list[SampleDataset | None] = builder(GPTDataset, list(num_samples), lambda: True, config).build()
            return datasets
    except Exception as error:
        # Where ranks are synchronised Megatron wraps the error of a cache that cannot be written.
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError):
            raise _cache_error(Path(config.path_to_cache), cause) from error
        raise


class _SingleProcessBuilder(BlendedMegatronDatasetBuilder):  # type: ignore[misc]
    """Megatron's builder for a process without ``torch.distributed``.

    A ``BlendedDataset`` with a cache asks for the rank and fails without a process group. Its index, unlike those of
    the blended corpora, is cheap: build it in memory.
    """

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        if cls is BlendedDataset:
            *others, config = args
            config = copy.copy(config)
            config.path_to_cache = None
            args = (*others, config)
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Silence Megatron's warning that the index of :class:`_SingleProcessBuilder` is not saved."""
    logger = logging.getLogger(BlendedDataset.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_shares(split: str, infos: Sequence[PrefixInfo], seq_length: int, wanted: Sequence[int]) -> None:
    """Check that a split is one, and that each corpus has a sample for training and validation where any is wanted.

    Args:
        split: as for :func:`build_datasets`.
        infos: of the corpora.
        seq_length: tokens per sample.
        wanted: samples for training and validation.

    Raises:
        UsageError: it is not, or a share is too small.
    """
    _check_split(split)
    for number, (name, remedy) in enumerate(zip(_NAMES, _REMEDIES, strict=False)):
        if not wanted[number]:
            continue
        share = _share(split, number)
        if share is None:
            message = f"--split {split} leaves no documents to the {name} set"
            raise UsageError(f"{message}; {remedy}", same_on_all_ranks=True)
        shortage = _shortage(share, infos, seq_length, name)
        if shortage is not None:
            raise UsageError(f"{shortage}; {remedy}", same_on_all_ranks=True)


def documents_of(split: str, part: str, count: int) -> range:
    """Return which of so many documents a part of a split has, as Megatron rounds it.

    Args:
        split: shares, such as "969,30,1".
        part: one of :data:`PARTS`.
        count: documents of the corpus.

    Raises:
        UsageError: the split is no list of shares.
    """
    _check_split(split)
    share = _share(split, PARTS.index(part))
    return range(0) if share is None else _rounded(share, count)


def _share(split: str, number: int) -> tuple[float, float] | None:
    """Return where a part of a split begins and ends, as fractions of the documents; None if it has no share."""
    matrix: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return matrix[number]


def _rounded(share: tuple[float, float], count: int) -> range:
    return range(*(round(edge * float(count)) for edge in share))


def _shortage(share: tuple[float, float], infos: Sequence[PrefixInfo], seq_length: int, name: str) -> str | None:
    """Name a corpus whose share has no sample, if there is one."""
    for info in infos:
        documents = _rounded(share, info.num_sequences)
        tokens = int(info.sequence_lengths()[documents.start : documents.stop].sum(dtype="int64"))
        if tokens < seq_length + 1:
            return (
                f"the {name} share of {info.prefix} holds {tokens} tokens in {len(documents)} of its"
                f" {info.num_sequences} documents, too few for one sample of {seq_length} + 1"
            )
    return None


def _check_split(split: str) -> None:
    """Check that a split is shares and nothing else: Megatron would drop a sign, and stop at a sum of 0."""
    shares = split.split(",")
    numbers = all(re.fullmatch(r"\s*\d{1,9}(\.\d{0,9})?\s*", share) for share in shares)
    if not (numbers and len(shares) <= 3 and any(map(float, shares))):
        raise UsageError(
            f"split {split!r} is no list of shares; give train,valid,test numbers such as 99,1,0",
            same_on_all_ranks=True,
        )


def _surplus(weights: Sequence[float], num_samples: Sequence[int]) -> float:
    """Return how many more samples than its share Megatron must prepare of each corpus.

    A blend takes every corpus' share rounded up, so with many corpora and few samples it is longer than asked for,
    and draws more of the heavy ones than Megatron's default surplus allows.
    """
    surplus = _MEGATRON_SURPLUS
    total = sum(weights)
    for wanted in num_samples:
        shares = [math.ceil(wanted * weight / total) for weight in weights]
        for weight, share in zip(weights, shares, strict=True):
            # Megatron's order of drawing leads a weight by less than one sample.
            drawn = math.floor(weight / total * sum(shares)) + 1
            if share and math.ceil(share * (1 + surplus)) < drawn:
                surplus = drawn / share - 1
    return surplus


def _cache_folder(cache_path: str | os.PathLike[str] | None, infos: Sequence[PrefixInfo]) -> Path:
    """Return where to cache the indices of these corpora.

    Megatron finds a cached index by the path of its corpus. A corpus that is made again under the same name needs
    another folder.
    """
    root = Path(f"{infos[0].prefix}-cache" if cache_path is None else cache_path)
    return root / hashlib.sha256("".join(info.digest for info in infos).encode()).hexdigest()[:16]


@contextmanager
def _held_cache(cache: Path) -> Iterator[None]:
    """Make the cache folder and keep it for this run while its indices are built; ranks other than 0 only read it.

    Runs of a sweep start together, and one must not read an index that another is writing. Indices that a killed run
    left unfinished are removed.
    """
    if _rank() != 0:
        yield
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "lock").open("w")
    except OSError as error:
        raise _cache_error(cache, error) from error
    with lock:
        # A file system without locks serves runs that do not start together all the same.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        known = _drop_damaged(cache)
        yield
        if {path.name for path in cache.glob("*.npy")} != known:
            checksums.write(cache, {path.name: checksums.checksum(path) for path in cache.glob("*.npy")})


def _drop_damaged(cache: Path) -> set[str]:
    """Remove the indices that are not what was written, or unfinished; return the names of those left.

    One flipped bit in a shuffled order would train on other samples, and nobody would know.
    """
    try:
        sums = checksums.read(cache) or {}
    except ValueError:
        sums = {}
    for path in cache.glob("*.npy"):
        known = path.name in sums and checksums.fault(cache, path.name, sums[path.name]) is None
        if not (known and _is_whole_array(path)):
            path.unlink()
    return {path.name for path in cache.glob("*.npy")}


def _is_whole_array(path: Path) -> bool:
    """Return whether a ``.npy`` file holds numbers, and has the size that its header tells of.

    Megatron loads it with ``allow_pickle``: what is no array would be unpickled, and so run whatever it names.
    """
    try:
        with path.open("rb") as stream:
            # As numpy writes arrays of numbers; other versions may ask for a header of 4 GB.
            if npy_format.read_magic(stream) != (1, 0):
                return False
        array = npy_format.open_memmap(path, mode="r")
    except Exception:  # a damaged header is parsed as Python, and fails in any way
        return False
    whole = int(array.offset) + array.nbytes == path.stat().st_size
    return whole and array.dtype.kind in "iu" and array.itemsize > 0


def _cache_error(cache: Path, error: OSError) -> UsageError:
    return UsageError(
        f"the data cache {cache} cannot be written: {error.strerror}; name a folder with --data-cache-path"
    )


def _parse_weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
