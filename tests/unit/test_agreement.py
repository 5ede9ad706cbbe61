"""What ranks must have alike before they train; jobs of ranks that differ are in tests/faults/test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperp.config import Config
from megatron_hyperp.training import agreement
from tests.toy import one_rank, toy_config


def test_all_settings_are_told(tmp_path: Path) -> None:
    config = toy_config("corpus", tmp_path).resolve()
    told = agreement.told(config, Path("x/iter_0000012"))
    names = [name for section in Config().to_dict().values() for name in section]
    assert len(names) == len(set(names)), "settings of two sections would hide each other"
    assert set(names) < set(told)
    assert told["checkpoint"] == "iter_0000012"
    assert told["lr"] == "0.05"


def test_a_rank_agrees_with_itself(tmp_path: Path) -> None:
    with one_rank():
        agreement.agree(toy_config("corpus", tmp_path).resolve(), None)


def test_a_changed_source_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package" / "training"
    package.mkdir(parents=True)
    monkeypatch.setattr(agreement, "__file__", str(package / "agreement.py"))
    (package / "agreement.py").write_text("1")
    first = agreement.code_digest()
    assert agreement.code_digest() == first
    (package.parent / "config.py").write_text("2")
    assert agreement.code_digest() != first
