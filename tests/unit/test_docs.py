"""The documentation tells the truth: the README's file tree, and every command in the README and in docs/."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.version import Version

from examples import pretrain_gpt
from megatron_hyperp import arguments

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TREE_TOPS = ("megatron_hyperp", "examples", "benchmarks", "tools")


def fences(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of one language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [content for name, content in blocks if name == language]


def tree_in_readme() -> set[str]:
    """Return the paths of the README's file tree; a folder ends in a slash."""
    block = next(block for block in fences(README, "") if block.startswith("megatron_hyperp/"))
    paths: set[str] = set()
    parents: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name]
        paths.add("".join(parents))
    return paths


def tree_on_disk() -> set[str]:
    listed = {str(path.relative_to(ROOT)) for top in TREE_TOPS for path in (ROOT / top).rglob("*") if path.is_file()}
    files = {
        path for path in listed if "__pycache__" not in path and not path.endswith(("__init__.py", "py.typed", ".md"))
    }
    folders = {f"{parent}/" for path in files for parent in map(str, Path(path).parents) if parent != "."}
    return files | folders


def test_file_tree() -> None:
    assert tree_in_readme() - {"tests/"} == tree_on_disk()


def commands() -> list[str]:
    """Return every command of the pages' bash blocks, continued lines joined."""
    found = []
    for page in PAGES:
        for block in fences(page.read_text(), "bash"):
            joined = block.replace("\\\n", " ")
            found += [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return found


@functools.cache
def help_of(script: str) -> str:
    """What a script prints with ``--help``; each is run once, in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    return shown.getvalue()


def written_configs() -> set[str]:
    """Config files that other commands of the pages write."""
    following = [words for command in commands() for words in pairwise(command.split())]
    return {name for flag, name in following if flag in ("--write-base", "--yaml")}


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    """The script exists and knows every flag; a make target exists."""
    words = command.split()
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    if words[0] == "docker":
        assert (ROOT / "Dockerfile").is_file()
        return
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file()
    flags = words[words.index(script) + 1 :]
    if script == "examples/pretrain_gpt.py":
        given = [flag for flag in flags if flag not in written_configs()]
        arguments.from_flags(vars(pretrain_gpt.parser().parse_args(given)))
    elif script.endswith(".py"):
        for flag in (word for word in flags if word.startswith("--")):
            assert flag in help_of(script)


def test_links_inside_the_repository_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_tool_has_help() -> None:
    for tool in sorted((ROOT / "tools").glob("*.py")):
        assert "usage:" in help_of(str(tool.relative_to(ROOT)))


def test_image() -> None:
    """The image pins what is tested, runs as a user of its own, and checks itself with a script that exists."""
    text = (ROOT / "Dockerfile").read_text()
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert not pins["BASE"].endswith(":latest")
    assert ":" in pins["BASE"]
    constraints = (ROOT / "constraints-3.12.txt").read_text()
    assert f"megatron-core=={pins['MEGATRON_CORE']}\n" in constraints
    for name, version in re.findall(r'"(sentencepiece|wandb)==([\d.]+)"', text):
        assert f"{name}=={version}\n" in constraints
    setup = (ROOT / "setup.py").read_text()
    [(low, high)] = re.findall(r"transformer-engine\[.*?\]>=([\d.]+),<([\d.]+); python_version >=", setup)
    assert Version(low) <= Version(pins["TRANSFORMER_ENGINE"]) < Version(high)
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users
    assert users[-1] != "root"
    for script in re.findall(r'CMD \["python", "(\S+?)"\]', text):
        assert (ROOT / script).is_file()
