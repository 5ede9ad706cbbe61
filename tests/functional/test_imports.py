"""What new interpreters import, and do not import, before they do what they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_hyperp.errors import EXIT_USAGE
from tests.functional.launch import ENTRY, ROOT
from tests.integration.test_rendezvous import HERE, program


def test_the_entry_point_imports_no_torch_until_it_trains() -> None:
    """A new process imports it again, before it does what it is for."""
    code = "import sys; from examples import pretrain_gpt; pretrain_gpt.parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_check_of_a_head_is_quick() -> None:
    """It does not import torch, which takes seconds."""
    words = ["-m", "megatron_hyperp.rendezvous", "--is-head", "1"]
    with program(b"") as port:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *words, HERE, str(port), "x"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    *imports, message = done.stderr.splitlines()
    assert done.returncode == 2
    assert message.startswith(f"error: port {port} of {HERE} is taken, and not by the job 'x'; ")
    assert not [line for line in imports if line.split("|")[-1].strip() == "torch"]


# Runs commands as their command lines do, one after the other, and prints what each writes to stderr and its exit code.
_RUN_ALL = """
import contextlib, io, json, runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([path, code, errors.getvalue()]))
"""
# What installs packages runs before there are any.
_COMMANDS = sorted({*(ROOT / "tools").glob("*.py"), ROOT / ENTRY} - {ROOT / "tools" / "choose_constraints.py"})


def run_all(folder: Path, version: str) -> dict[str, tuple[int, str]]:
    """Run every command where Megatron-Core has another version, and cannot be imported; return codes and stderr."""
    metadata = folder / f"megatron_core-{version}.dist-info" / "METADATA"
    package = folder / "megatron" / "core" / "__init__.py"
    for file, text in (
        (metadata, f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n"),
        (package, "raise ImportError('this Megatron-Core has other names')\n"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, *map(str, _COMMANDS)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return {Path(path).name: (code, errors) for path, code, errors in map(json.loads, done.stdout.splitlines())}


def test_every_command_refuses_an_old_megatron_core_in_one_line(tmp_path: Path) -> None:
    found = run_all(tmp_path, "0.15.3")
    assert len(found) == len(_COMMANDS) > 10
    for name, (code, errors) in found.items():
        assert code == EXIT_USAGE, name
        assert errors.startswith("error: megatron-core 0.15.3 is installed; supported are versions "), name
        assert errors.count("\n") == 1, name


def test_every_command_speaks_of_a_new_megatron_core_before_it_imports_it(tmp_path: Path) -> None:
    """A warning: the import may fail, and this line says why. An error where Python is too old for it."""
    first = "warning: megatron-core 0.20.0 is newer than all tested versions ("
    if sys.version_info < (3, 12):
        first = "error: megatron-core 0.20.0 needs Python 3.12 or newer, "
    found = run_all(tmp_path, "0.20.0")
    assert len(found) == len(_COMMANDS)
    for name, (_, errors) in found.items():
        line, _, rest = errors.partition("\n")
        assert line.startswith(first), name
        assert not rest or "this Megatron-Core has other names" in rest, name
