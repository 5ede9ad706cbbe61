"""The constraints of each Python, and what the set-up says about those that do not go together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import choose_constraints as tool

OF_311, OF_312 = tool.constraints_file((3, 11)), tool.constraints_file((3, 12))


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\S+)==(\S+)$", path.read_text().lower().replace("_", "-")))


def test_each_python_has_its_megatron_core() -> None:
    assert pins(OF_311)["megatron-core"] == "0.16.1"
    assert pins(OF_312)["megatron-core"] == "0.19.2"
    assert tool.constraints_file((3, 13)) == OF_312


def test_all_else_is_the_same() -> None:
    first, second = pins(OF_311), pins(OF_312)
    shared = first.keys() & second.keys() - {"megatron-core"}
    assert len(shared) > 80
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


def test_another_version_takes_the_place_of_the_pin() -> None:
    changed = tool.constraints((3, 12), "0.18.2")
    assert "\nmegatron-core==0.18.2\n" in changed
    assert changed.count("megatron-core") == 1
    assert "\nmegatron-core==0.18.*\n" in tool.constraints((3, 13), "0.18")
    assert tool.constraints((3, 11), None) == OF_311.read_text()


@pytest.mark.parametrize("asked", ["0.19", "0.19.2", "0.17.1"])
def test_python_3_11_is_refused_in_one_line(asked: str) -> None:
    with pytest.raises(SystemExit) as left:
        tool.constraints((3, 11), asked)
    assert left.value.code == (
        f"error: megatron-core {asked} needs Python 3.12 or newer, and this is Python 3.11; give PYTHON=python3.12"
    )


def test_what_is_no_version_and_no_python() -> None:
    with pytest.raises(SystemExit, match="MEGATRON_CORE is 'latest'; give a version"):
        tool.constraints((3, 12), "latest")
    with pytest.raises(SystemExit, match=r"Python 3\.10 is too old"):
        tool.constraints_file((3, 10))


def test_an_environment_of_another_python_is_recognized(tmp_path: Path) -> None:
    assert not tool.differs((3, 12), tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    assert tool.differs((3, 12), tmp_path)
    assert not tool.differs((3, 11), tmp_path)
