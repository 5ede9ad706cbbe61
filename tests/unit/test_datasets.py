"""Datasets and batches: order, layouts, resuming, blends, the cache, and refusals."""

from __future__ import annotations

import fcntl
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hyperp.data.batches import Batch, SampleDataset, batches
from megatron_hyperp.data.corpus import Document
from megatron_hyperp.data.datasets import PARTS, Datasets, build_datasets, documents_of, parse_blend
from megatron_hyperp.data.indexed import write_corpus
from megatron_hyperp.data.tokenizer import NullTokenizer
from megatron_hyperp.errors import UsageError

ROOT = Path(__file__).parents[2]
SEQ_LENGTH = 16
TOKENIZER = NullTokenizer(5000)
BATCH_KEYS = ["labels", "loss_mask", "position_ids", "tokens"]


def make_corpus(prefix: Path, documents: int, length: int = 30, first: int = 0) -> Path:
    """Write documents that count upwards, so that every sample tells where it comes from."""
    starts = range(first, first + documents * length, length)
    texts = (" ".join(str(start + place) for place in range(length)) for start in starts)
    write_corpus([Document(text, len(text)) for text in texts], prefix, TOKENIZER, overwrite=True)
    return prefix


def build(*prefixes: object, split: str = "90,10,0", **changes: Any) -> Datasets:
    options: dict[str, Any] = {"seq_length": SEQ_LENGTH, "seed": 7, "num_samples": (64, 0, 0), "tokenizer": TOKENIZER}
    return build_datasets(data_path=[str(prefix) for prefix in prefixes], split=split, **(options | changes))


def built(dataset: SampleDataset | None) -> SampleDataset:
    assert dataset is not None
    return dataset


def tokens_of(loader: Any, count: int) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in itertools.islice(loader, count)])


def check_equal(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus", 60)


@pytest.fixture(scope="module")
def train(prefix: Path) -> SampleDataset:
    return built(build(prefix).train)


# Batches


def test_batch_shapes_types_and_labels(train: SampleDataset) -> None:
    batch = next(batches(train, micro_batch_size=3))
    assert sorted(batch) == BATCH_KEYS
    assert all(value.shape == (3, SEQ_LENGTH) for value in batch.values())
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "loss_mask": torch.float32,
    }
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert torch.equal(batch["position_ids"], torch.arange(SEQ_LENGTH).expand(3, -1))
    assert batch["loss_mask"].all()
    # The label of the last token is the next token of the document.
    steps = batch["labels"][:, -1] - batch["tokens"][:, -1]
    last_is_end = (batch["labels"][:, -1] == TOKENIZER.eod) | (batch["tokens"][:, -1] == TOKENIZER.eod)
    assert (steps[~last_is_end] == 1).all()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batch_does_not_depend_on_the_layout(train: SampleDataset, micro_batch_size: int, ranks: int) -> None:
    global_batch, first = 32, 32
    expected = torch.stack([train[number]["tokens"] for number in range(first, first + global_batch)])
    micro_batches = global_batch // (micro_batch_size * ranks)
    parts = torch.stack(
        [
            tokens_of(
                batches(
                    train,
                    micro_batch_size=micro_batch_size,
                    consumed_samples=first,
                    data_parallel_rank=rank,
                    data_parallel_size=ranks,
                ),
                micro_batches,
            ).view(micro_batches, micro_batch_size, SEQ_LENGTH)
            for rank in range(ranks)
        ],
        dim=1,
    )
    assert torch.equal(parts.reshape(global_batch, SEQ_LENGTH), expected)


def test_resuming_continues_with_the_same_batches(prefix: Path, train: SampleDataset) -> None:
    whole = list(itertools.islice(batches(train, micro_batch_size=4), 16))
    again = built(build(prefix).train)
    resumed = list(itertools.islice(batches(again, micro_batch_size=4, consumed_samples=24), 10))
    for left, right in zip(whole[6:], resumed, strict=True):
        check_equal(left, right)


def test_a_number_of_batches_is_the_same_each_time(train: SampleDataset) -> None:
    first, second = (list(batches(train, micro_batch_size=5, num_batches=3)) for _ in range(2))
    assert len(first) == 3
    for left, right in zip(first, second, strict=True):
        check_equal(left, right)


def test_the_global_random_state_is_left_alone(train: SampleDataset) -> None:
    state = torch.get_rng_state()
    next(batches(train, micro_batch_size=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_running_past_the_end_is_an_error(train: SampleDataset) -> None:
    length = len(train)  # type: ignore[arg-type]
    loader = batches(train, micro_batch_size=3, data_parallel_size=2, consumed_samples=length - 13)
    assert tokens_of(loader, 2).shape == (6, SEQ_LENGTH)
    with pytest.raises(UsageError, match=f"holds {length} samples and another batch is asked for"):
        next(loader)
    with pytest.raises(UsageError, match=f"holds {length} samples and 3 batches are asked for"):
        batches(train, micro_batch_size=5, consumed_samples=length - 14, num_batches=3)
    assert len(list(batches(train, micro_batch_size=5, consumed_samples=length - 15, num_batches=3))) == 3
    with pytest.raises(UsageError, match="another batch"):
        next(batches(train, micro_batch_size=1, consumed_samples=length + 5))


# Datasets


def test_splits_share_no_document_and_unwanted_ones_are_left_out(prefix: Path) -> None:
    train, valid, test = build(prefix, split="80,10,10", num_samples=(30, 5, 0))
    assert test is None
    seen = [
        set(tokens_of(batches(built(dataset), micro_batch_size=1), 5).flatten().tolist()) for dataset in (train, valid)
    ]
    assert max(seen[0] - {TOKENIZER.eod}) < 48 * 30 <= min(seen[1])


def test_a_test_share_without_a_sample_is_left_out(prefix: Path) -> None:
    notes: list[str] = []
    datasets = build(prefix, split="969,30,1", num_samples=(30, 5, 5), note=notes.append)
    assert datasets.test is None
    [line] = notes
    assert re.search(
        r"^no evaluation on the test set: the test share of .*corpus holds 0 tokens in 0 of its 60 d", line
    )
    assert build(prefix, split="90,10,0", num_samples=(30, 5, 5), note=notes.append).test is None
    assert len(notes) == 1


def test_a_test_set_leaves_the_order_of_the_others_alone(tmp_path: Path) -> None:
    """Of a blend with few samples Megatron prepares more for the smallest of all splits that are built together."""
    corpora = [make_corpus(tmp_path / str(number), 40, first=100 * number, length=30) for number in range(7)]
    data_path = [10, corpora[0], *itertools.chain.from_iterable((1, path) for path in corpora[1:])]
    without, tested = (build(*data_path, split="80,10,10", num_samples=(400, 8, size)) for size in (0, 3))
    for number in range(2):
        one, other = (tokens_of(batches(built(sets[number]), micro_batch_size=1), 8) for sets in (without, tested))
        assert torch.equal(one, other)
    assert len(list(batches(built(tested.test), micro_batch_size=1, num_batches=3))) == 3


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("969,30,1", ["0:58", "58:60", "60:60"]),
        ("100,0,0", ["0:60", "0:0", "0:0"]),
        ("8,1,1", ["0:48", "48:54", "54:60"]),
    ],
)
def test_parts_of_a_split_are_megatrons(split: str, expected: list[str]) -> None:
    parts = [documents_of(split, part, 60) for part in PARTS]
    assert [f"{part.start}:{part.stop}" for part in parts] == expected


def test_an_epoch_holds_every_token_once(prefix: Path) -> None:
    dataset = built(build(prefix, split="1", num_samples=(1, 0, 0)).train)
    length = len(dataset)  # type: ignore[arg-type]
    assert length == (60 * 31 - 1) // SEQ_LENGTH
    tokens = tokens_of(batches(dataset, micro_batch_size=1), length).flatten()
    counts = np.unique(tokens[tokens != TOKENIZER.eod].numpy(), return_counts=True)[1]
    assert counts.max() == 1
    assert counts.sum() > 59 * 30 - SEQ_LENGTH


def test_several_epochs_are_drawn_where_needed(prefix: Path) -> None:
    assert len(built(build(prefix, num_samples=(1000, 0, 0)).train)) >= 1000  # type: ignore[arg-type]


def test_seed_changes_the_order(prefix: Path, train: SampleDataset) -> None:
    other = built(build(prefix, seed=8).train)
    assert not torch.equal(
        tokens_of(batches(train, micro_batch_size=4), 4), tokens_of(batches(other, micro_batch_size=4), 4)
    )


def test_masks_follow_the_options(prefix: Path) -> None:
    options: dict[str, Any] = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    dataset = built(build(prefix, create_attention_mask=True, **options).train)
    batch = next(batches(dataset, micro_batch_size=8))
    ends = batch["tokens"] == TOKENIZER.eod
    assert ends[:, :-1].any()
    assert torch.equal(batch["loss_mask"] == 0, ends)
    assert (batch["position_ids"][:, 1:][ends[:, :-1]] == 0).all()
    assert batch["attention_mask"].shape == (8, 1, SEQ_LENGTH, SEQ_LENGTH)
    for sample, row in zip(*ends[:, :-1].nonzero(as_tuple=True), strict=True):
        assert batch["attention_mask"][sample, 0, row + 1, : row + 1].all()
    with pytest.raises(UsageError, match="set create_attention_mask"):
        build(prefix, **options)


def test_blend_follows_the_weights(tmp_path: Path) -> None:
    small, large = make_corpus(tmp_path / "small", 10), make_corpus(tmp_path / "large", 40, first=2000)
    for data_path, share in (((3, small, 1, large), 0.75), ((small, large), 0.2), ((0.5, small, 0.5, large), 0.5)):
        dataset = built(build(*data_path, num_samples=(80, 0, 0)).train)
        batch = next(batches(dataset, micro_batch_size=80))
        assert sorted(batch) == BATCH_KEYS
        of_small = (batch["tokens"] < 2000).any(dim=1).float().mean().item()
        assert of_small == pytest.approx(share, abs=0.03)
    alone, weighted = (built(build(*path).train) for path in ((small,), (0.3, small)))
    assert torch.equal(
        tokens_of(batches(alone, micro_batch_size=4), 8), tokens_of(batches(weighted, micro_batch_size=4), 8)
    )


def test_blend_of_many_corpora_with_few_samples(tmp_path: Path) -> None:
    # One sample an epoch: Megatron's default surplus prepares 4 samples of the first corpus, and draws 6.
    corpora = [make_corpus(tmp_path / str(number), 2, length=8) for number in range(13)]
    data_path = [10, corpora[0], *itertools.chain.from_iterable((1, path) for path in corpora[1:])]
    dataset = built(build(*data_path, split="1", num_samples=(5, 0, 0)).train)
    assert len(list(batches(dataset, micro_batch_size=1, num_batches=5))) == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], [(None, "a")]),
        (["a", " b "], [(None, "a"), (None, "b")]),
        (["a", "b", "c"], [(None, "a"), (None, "b"), (None, "c")]),
        (["1", "a"], [(1.0, "a")]),
        (["0.7", "a", "30", "b"], [(0.7, "a"), (30.0, "b")]),
        (["2", "./3"], [(2.0, "./3")]),
    ],
)
def test_blends_are_read(words: list[str], expected: list[tuple[float | None, str]]) -> None:
    assert parse_blend(words) == expected


@pytest.mark.parametrize(
    "words",
    [[], [""], ["1"], ["0.7", "a", "0.3"], ["0.7", "a", "b"], ["a", "0.7"], ["1", "2"], ["1", "a", "b", "c"]]
    + [[weight, "a"] for weight in ("0", "-1", "nan", "inf")],
)
def test_bad_blends_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="data path"):
        parse_blend(words)


@pytest.mark.parametrize("split", ["", "a", "-1,2", "0,0", "1,1,1,1", "99;1", "nan,1", "1e-7,1"])
def test_bad_splits_are_refused(prefix: Path, split: str) -> None:
    with pytest.raises(UsageError, match="is no list of shares"):
        build(prefix, split=split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split": "100,0,0", "num_samples": (8, 4, 0)},
            "leaves no documents to the validation set;.*99,1,0.*ion: --eval-interval 0",
        ),
        ({"split": "0,1,0"}, "leaves no documents to the training set; give it a larger share in --split"),
        (
            {"split": "999,1,0", "num_samples": (8, 4, 0)},
            "validation share of .*corpus holds 0 tokens in 0 of its 60.*--eval-interval 0$",
        ),
        ({"split": "1", "seq_length": 60 * 31}, "training share of .*corpus holds 1860 tokens in 60 of its 60"),
        ({"tokenizer": NullTokenizer(100)}, r"corpus\.bin holds token id 4999, outside a vocabulary of 100"),
    ],
)
def test_what_cannot_be_built_is_refused(prefix: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(prefix, **changes)


def test_shortest_corpus_is_accepted(prefix: Path) -> None:
    assert len(built(build(prefix, split="1", seq_length=60 * 31 - 1, num_samples=(2, 0, 0)).train)) >= 2  # type: ignore[arg-type]


def test_damaged_prefix_is_refused_before_megatron_sees_it(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.bin does not exist"):
        build(prefix, tmp_path / "absent")


# Cache


def test_cache_is_used_again_and_mended(prefix: Path, tmp_path: Path) -> None:
    expected = tokens_of(batches(built(build(prefix, cache_path=tmp_path).train), micro_batch_size=4), 8)
    arrays = sorted(tmp_path.rglob("*.npy"))
    assert len(arrays) == 3
    times = [path.stat().st_mtime_ns for path in arrays]
    build(prefix, cache_path=tmp_path)
    assert [path.stat().st_mtime_ns for path in arrays] == times
    for damage in (b"", arrays[0].read_bytes()[:-4]):
        arrays[0].write_bytes(damage)
        assert torch.equal(
            tokens_of(batches(built(build(prefix, cache_path=tmp_path).train), micro_batch_size=4), 8), expected
        )


def test_corpus_made_again_under_its_name_gets_a_new_cache(tmp_path: Path) -> None:
    prefix = make_corpus(tmp_path / "corpus", 60)
    build(prefix)
    make_corpus(prefix, 40, first=3000)
    tokens = tokens_of(batches(built(build(prefix).train), micro_batch_size=1), 8)
    assert tokens.min() >= 3000


def test_runs_that_start_together_take_turns_in_the_cache(prefix: Path, tmp_path: Path) -> None:
    build(prefix, cache_path=tmp_path)
    (lock_path,) = tmp_path.rglob("lock")
    with ThreadPoolExecutor() as pool:
        with lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(build, prefix, cache_path=tmp_path, num_samples=(8, 0, 0))
            time.sleep(0.3)
            assert not waiting.done()
            assert len(list(tmp_path.rglob("*.npy"))) == 3
        assert built(waiting.result(timeout=30).train) is not None
    assert len(list(tmp_path.rglob("*.npy"))) == 6


def test_cache_that_cannot_be_written_is_refused(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data cache .* cannot be written"):
        build(prefix, cache_path=tmp_path / "file" / "cache")
