"""tools/inspect_checkpoint.py: every tensor with its norm, deviations from spheres, differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.convert.hyperp import HyperPSource, write_weights
from megatron_hyperp.convert.inspection import Difference, differences, weight_rows
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.optim.sphere import sphere_radius
from tests.random_source import RandomSource, model_config
from tests.toy import EXPERTS
from tools import inspect_checkpoint

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


class Changed(RandomSource):
    """Random weights, one of them 1.25 times its sphere, some with another number in a place."""

    changed: dict[str, float]

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if name == QKV:
            radius = sphere_radius("hidden", tuple(tensor.shape), radius_scale=1.0, output_init_std=0.02)
            tensor *= 1.25 * radius / torch.linalg.vector_norm(tensor)
        if name in self.changed:
            tensor.view(-1)[3] = self.changed[name]
        return tensor


def saved(folder: Path, changed: dict[str, float] | None = None, **overrides: Any) -> HyperPSource:
    source = Changed(model_config(**overrides))
    source.changed = changed or {}
    folder.mkdir()
    write_weights(folder, source, layout=Layout(), dtype=None, advance=lambda _: None)
    return HyperPSource(folder)


@pytest.mark.parametrize("overrides", [{}, EXPERTS])
def test_every_tensor_is_told(tmp_path: Path, overrides: dict[str, Any]) -> None:
    source = saved(tmp_path / "a", **overrides)
    rows = {row.name: row for row in weight_rows(source)}
    assert list(rows) == list(source.parameters)
    for name, row in rows.items():
        tensor = source.read(name)
        assert (row.shape, row.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert row.norm == pytest.approx(float(tensor.double().norm()))
        assert (row.deviation is None) == (row.rule == "adamw")
    assert rows[QKV].deviation == pytest.approx(0.25, rel=1e-5)
    assert rows["output_layer.weight"].rule == "adamh"


def test_parts_have_spheres_of_their_own(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", matrix_split="component")
    [row] = [row for row in weight_rows(source) if row.name == FC1]
    gate, up = source.read(FC1).double().chunk(2)
    radius = (len(gate) / 3) ** 0.5
    assert row.radius == pytest.approx(radius)
    assert row.deviation == pytest.approx(max(abs(float(part.norm()) / radius - 1) for part in (gate, up)))


def test_differences_are_of_bits(tmp_path: Path) -> None:
    nan = float("nan")
    first, second = saved(tmp_path / "a", {FC1: nan}), saved(tmp_path / "b", {FC1: nan, QKV: 5.0})
    [found] = [each for each in differences(first, second, states=False) if each]
    gap = first.read(QKV).double() - second.read(QKV).double()
    relative = float(gap.norm() / first.read(QKV).double().norm())
    assert (found.name, found.largest) == (QKV, float(gap.abs().max()))
    assert found.relative == pytest.approx(relative)
    third = saved(tmp_path / "c", {FC1: nan}, num_layers=5)
    only = {each for each in differences(first, third, states=False) if each}
    assert Difference("decoder.layers.4.mlp.linear_fc1.weight", "only in the second") in only
    assert all(each.name.startswith("decoder.layers.4.") for each in only)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", {QKV: 5.0}, seed=7)
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--tensors", "*linear_qkv*"]) == 0
    printed = capsys.readouterr().out
    assert "none: weights alone" in printed
    [line] = [line for line in printed.splitlines() if line.startswith(QKV)]
    assert line.split()[-1] == "2.5e-01"
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert sum(torch.Size(row["shape"]).numel() for row in content["tensors"]) == content["parameters"]
    assert inspect_checkpoint.main(["--diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("seed: ")
    assert QKV in printed
    assert printed.splitlines()[-1].endswith("are alike to the bit, 1 are not")
    assert inspect_checkpoint.main(["--diff", str(tmp_path / "a"), str(tmp_path / "a"), "--json"]) == 0
