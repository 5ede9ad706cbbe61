"""The table of layouts in docs/multi-node.md is what the planner prints, and the trainer takes what it writes."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from examples import pretrain_gpt
from megatron_hyperp import arguments
from tools import plan_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "multi-node.md"
RECIPES = [f"{kind}_d{depth}" for kind in ("dense", "moe") for depth in (8, 12, 16, 20, 24)]
WORLDS = (8, 64, 256, 1024)


def words(name: str) -> list[str]:
    """The planner's flags for a recipe, as the page gives them."""
    return ["--config", str(ROOT / "examples" / "configs" / f"{name}.yaml")] + (
        ["--num-experts", "64"] if name.startswith("moe") else []
    )


def spaced(text: str) -> list[str]:
    """Lines with single spaces: columns are as wide as the table needs."""
    return [re.sub(" +", " ", line) for line in text.splitlines() if line]


def printed(name: str, worlds: tuple[int, ...]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        plan_run.main([*words(name), "--gpus", *map(str, worlds), "--gpu", "H100", "H200"])
    return spaced(out.getvalue())


def documented() -> dict[str, list[str]]:
    """The page's lines on each recipe."""
    [block] = [
        text for text in re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.S | re.M) if "with overheads" in text
    ]
    return dict(zip(RECIPES, map(spaced, re.split(r"\n\n(?=model )", block)), strict=True))


@pytest.mark.parametrize(
    ("name", "worlds"),
    [
        ("dense_d8", (8, 64)),
        ("moe_d8", (8,)),
        *(
            pytest.param(name, worlds, marks=pytest.mark.matrix)
            for name, worlds in (
                ("dense_d8", (256, 1024)),
                ("dense_d24", WORLDS[:3]),
                ("moe_d8", (64,)),
                ("moe_d24", (8,)),
            )
        ),
    ],
)
def test_rows_are_what_the_planner_prints(name: str, worlds: tuple[int, ...]) -> None:
    shown, rows = printed(name, worlds), documented()[name]
    titles = tuple(f"{gpus} " for gpus in worlds)
    assert shown == [line for line in rows if not re.match(r"\d", line) or line.startswith(titles)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_table_is_what_the_planner_prints(name: str) -> None:
    assert printed(name, WORLDS) == documented()[name]


def test_a_written_layout_serves_alone_and_beside_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    plan_run.main([*words("moe_d8"), "--gpus", "64", "--yaml", str(path)])
    alone = arguments.load_yaml(path)
    assert alone == arguments.load_yaml(ROOT / "examples" / "configs" / "moe_d8.yaml", path)
    assert alone.moe.num_experts == 64


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_trainer_takes_every_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dry runs of the recipe on all numbers of GPUs, with what is written for those."""
    for gpus in WORLDS:
        path = tmp_path / f"{gpus}.yaml"
        plan_run.main([*words(name), "--gpus", str(gpus), "--yaml", str(path)])
        flags = ["--config", words(name)[1], str(path), "--dry-run", "--world-size", str(gpus)]
        capsys.readouterr()
        assert not pretrain_gpt.main(flags)
        shown = capsys.readouterr().out
        assert f"\nrank 0 of {gpus}, on node 0: " in shown
        assert "GiB fits into 71.1 GiB" in shown
        assert "DOES NOT FIT" not in shown
