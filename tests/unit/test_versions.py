"""Which versions of Megatron-Core, Python and nvidia-resiliency-ext go together, and what is said about others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

from megatron_hyperp.errors import EXIT_USAGE, UsageError, run_command
from megatron_hyperp.megatron_compat import versions

ROOT = Path(__file__).resolve().parents[2]
RANGE = ">=0.16.1,<0.20"


@pytest.mark.parametrize("version", versions.TESTED, ids=str)
def test_tested_versions_pass_without_a_word(version: Version) -> None:
    assert version in versions.SUPPORTED
    assert versions.check(version, python=(3, 12), resiliency_ext=Version("0.6.0")) is None


def test_a_later_patch_of_a_tested_line_passes_too() -> None:
    assert versions.check(Version("0.19.7"), python=(3, 13)) is None


@pytest.mark.parametrize("old", ["0.15.3", "0.16.0"])
def test_an_older_one_is_refused_with_the_range(old: str) -> None:
    with pytest.raises(UsageError) as refused:
        versions.check(Version(old), python=(3, 12))
    line = str(refused.value)
    assert f"megatron-core {old} is installed; supported are versions" in line
    assert all(bound in line for bound in RANGE.split(","))


@pytest.mark.parametrize("new", ["0.20.0", "0.20.0rc1", "1.0"])
def test_a_newer_one_is_warned_of_with_the_range(new: str) -> None:
    warning = versions.check(Version(new), python=(3, 12)) or ""
    assert warning.startswith(f"megatron-core {new} is newer than all tested versions (0.16.1, 0.17.1, 0.18.2, 0.19.2")
    assert all(bound in warning for bound in RANGE.split(","))
    assert "\n" not in warning


@pytest.mark.parametrize("version", ["0.17.0", "0.19.2", "0.20.0"])
def test_python_3_11_is_too_old_for_0_17_and_later(version: str) -> None:
    with pytest.raises(UsageError, match=rf"{version} needs Python 3.12 or newer, and this is Python 3.11"):
        versions.check(Version(version), python=(3, 11))
    assert versions.check(Version("0.16.1"), python=(3, 11)) is None


def test_an_old_resiliency_extension_is_refused_in_one_line() -> None:
    """Importing Megatron-Core's checkpoints would end in an AttributeError."""
    with pytest.raises(UsageError, match=r"0.17.1 cannot be imported with nvidia-resiliency-ext 0.4.1; it needs 0.6"):
        versions.check(Version("0.17.1"), python=(3, 12), resiliency_ext=Version("0.4.1"))
    assert versions.check(Version("0.16.1"), python=(3, 11), resiliency_ext=Version("0.4.1")) is None


def test_a_command_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    too_old, too_new = Version("0.15.3"), Version("0.20.0")
    check = versions.check
    monkeypatch.setattr(versions, "check_installed", lambda: check(too_old, python=(3, 12)))
    with pytest.raises(SystemExit) as left:
        run_command(lambda _: 0, [])
    errors = capsys.readouterr().err
    assert left.value.code == EXIT_USAGE
    assert errors.startswith("error: megatron-core 0.15.3")
    assert errors.count("\n") == 1
    monkeypatch.setattr(versions, "check_installed", lambda: check(too_new, python=(3, 12)))
    with pytest.raises(SystemExit) as left:
        run_command(lambda _: 0, [])
    errors = capsys.readouterr().err
    assert not left.value.code
    assert errors.startswith("warning: megatron-core 0.20.0 is newer")
    assert errors.count("\n") == 1


def test_a_missing_one_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.installed("no-such-package") is None
    monkeypatch.setattr(versions, "installed", lambda _: None)
    with pytest.raises(UsageError, match="megatron-core is not installed; pip"):
        versions._megatron_core_version()


def test_the_package_asks_for_the_same_range() -> None:
    asked = re.search(r'"megatron-core([^"]+)"', (ROOT / "setup.py").read_text())
    assert asked
    assert versions.SpecifierSet(asked[1]) == versions.SUPPORTED
