"""What a save leaves to others, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest
import torch

from megatron_hyperp.errors import UsageError
from megatron_hyperp.megatron_compat.async_saving import _Packed
from megatron_hyperp.training import saving
from megatron_hyperp.training.saving import _check_finite
from tests.toy import one_rank


@dataclass
class Shard:
    key: str
    data: torch.Tensor


def test_values_are_bytes_to_the_process_between() -> None:
    held: Queue[bytes] = Queue()
    queue = _Packed(held)
    queue.put({"a": [1, 2]})
    assert isinstance(held.queue[0], bytes)
    assert queue.get_nowait() == {"a": [1, 2]}
    with pytest.raises(Empty):
        queue.get_nowait()


def test_each_of_several_shards_of_one_name_must_be_finite() -> None:
    """Halves of a fused weight and experts have one name on a rank."""
    sound, bad = torch.zeros(2), torch.tensor([1.0, float("nan")])
    with one_rank():
        _check_finite({"model": [Shard("w", sound), Shard("w", sound)], "steps": 3}, 5)
        with pytest.raises(UsageError, match="w of rank 0 is not finite after iteration 5, so nothing is saved"):
            _check_finite({"model": [Shard("w", bad), Shard("w", sound)]}, 5)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), pickle.UnpicklingError("no pickle")])
def test_a_save_that_cannot_be_read_back_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all ranks: rank 0 reads, and the others wait for its answer, whatever goes wrong."""

    def fails(_: Path) -> str | None:
        raise error

    monkeypatch.setattr(saving, "fault", fails)
    with one_rank(), pytest.raises(UsageError, match=r"is not complete .*(Input/output error|no pickle)") as caught:
        saving._read_back(tmp_path)
    assert caught.value.same_on_all_ranks
