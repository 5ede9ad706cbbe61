"""The picture of benchmarks/lr_transfer, from a synthetic table."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from benchmarks.lr_transfer.picture import main
from benchmarks.lr_transfer.plan import PRESETS, parts
from megatron_hyperp.errors import UsageError

CPU = PRESETS["cpu"]


def write(path: Path, points: int) -> Path:
    """The losses of every model, whose best learning rate is in the middle of so many."""
    rows: dict[tuple[object, ...], dict[str, object]] = {}
    for part in parts(CPU, ["hyperp", "adamw"]):
        for power in range(points):
            eta0 = 0.06 * 2 ** ((power - points // 2) / 2)
            row = {"method": part.method, "depth": part.depth, "tokens": part.tokens, "hidden_size": part.width}
            row |= {"moe_topk": part.topk, "lr": eta0 / 2, "eta0": eta0, "loss": 3 + math.log(eta0 / 0.06) ** 2}
            rows[(*part.model, power)] = row
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())
    return path


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "cpu.csv", points=5)
    main(["--preset", "cpu", "--csv", str(table)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'cpu.png'}\n"
    assert (tmp_path / "cpu.png").stat().st_size > 20_000


def test_what_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "cpu.csv", points=2)
    for words, message in (
        (f"--csv {table}", "no axis has a best learning rate at its base and at another value"),
        (f"--csv {table} --output p.gif", r"--output p\.gif must end in one of \.png, \.pdf, \.svg"),
        (f"--csv {tmp_path / 'none.csv'}", r"there is no .*none\.csv to draw; run\.py"),
    ):
        with pytest.raises(UsageError, match=message):
            main(words.split())
