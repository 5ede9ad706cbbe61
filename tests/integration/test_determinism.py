"""What ``--deterministic-mode`` sets, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import determinism
from megatron_hyperp.training.determinism import SETTINGS
from tests.toy import EXPERTS, one_rank, rows_of_training, toy_config, write_corpus


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave torch and the environment as they were."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            # Noted even where it is not set.
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setattr(torch.backends.cudnn, "deterministic", False)
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        yield
    torch.use_deterministic_algorithms(False)


def test_what_it_sets() -> None:
    determinism.begin()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert {name: os.environ[name] for name in SETTINGS} == {name: allowed[0] for name, allowed in SETTINGS.items()}


def test_a_setting_that_is_deterministic_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    determinism.begin()
    assert os.environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")],
)
def test_a_setting_that_is_not_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"^{name} is {value}, .*--deterministic-mode .*; unset it, or give"):
        determinism.begin()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_deterministic_kernel_is_refused_by_torch() -> None:
    """Shows that the mode reaches torch, by an operation that is not deterministic even on the CPU."""
    determinism.begin()
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)


def test_two_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    from megatron_hyperp.model.build import transformer_config

    device.adapt_megatron()
    determinism.begin()
    prefix = write_corpus(tmp_path)
    common = {**EXPERTS, "num_layers": 1, "train_iters": 4, "deterministic_mode": True}
    config = toy_config(prefix, tmp_path, **common, check_weight_hash_across_dp_replicas_interval=1)
    with one_rank():
        core = transformer_config(config.resolve(world_size=1))
        rows, again = ([row | {"tokens_per_s": 0.0} for row in rows_of_training(config)] for _ in range(2))
    assert core.deterministic_mode
    assert rows == again
