"""The benchmark of transfer: its plan is one that the trainer takes, and its tables show what was put into them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from benchmarks.lr_transfer.plan import PRESETS, methods, parts, spec
from benchmarks.lr_transfer.report import find, report
from benchmarks.lr_transfer.run import main
from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling.spec import Spec
from tests.toy import write_corpus

CPU = PRESETS["cpu"]
OPTIMUM = {"hyperp": 0.05, "adamw": 0.004}


@pytest.mark.parametrize("name", PRESETS)
def test_plan(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    prefix = write_corpus(tmp_path, documents=20)
    planned = Spec(spec(preset, preset.methods, data=prefix, tokenizer="null:64"), source=name)
    models = {part.model for part in parts(preset, preset.methods)}
    assert len(planned.series) == len(models)
    assert planned.series[0].point(0).row([])["method"] == preset.methods[0]
    for series in planned.series:
        resolved = series.point(0).resolved
        assert resolved.model.kv_channels == preset.head_size
        assert resolved.batch_tokens == resolved.transfer.base_batch_tokens
        assert resolved.training.train_tokens % resolved.batch_tokens == 0
        if series.method == "hyperp-held":
            rates = [series.point(power).resolved for power in (-1, 1)]
            assert len({config.learning_rate().value for config in rates}) == 2
            for config in rates:
                held = config.learning_rate().value * config.optimizer.embedding_lr_mult
                assert held == pytest.approx(preset.held)
                assert config.optimizer.adam_lr_mult == config.optimizer.embedding_lr_mult


def test_the_cpu_preset_is_what_the_issue_asks_for() -> None:
    assert {"hyperp", "muonh", "muon", "adamw"} < set(CPU.methods) == set(methods(CPU))
    assert max(CPU.widths) == 4 * min(CPU.widths)
    assert CPU.depths == (2, 4, 8)
    assert max(CPU.tokens) == 16 * min(CPU.tokens)
    assert CPU.topk == (2, 4, 8)


def write_results(path: Path) -> None:
    """Losses with known minima: hyperp's follow the law but for K, adamw's move one step for each doubling of depth."""
    with path.open("w", newline="") as stream:
        columns = ["method", "depth", "tokens", "flops", "lr", "loss", "hidden_size", "moe_topk", "eta0", "seed"]
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for part in {part.model: part for part in parts(CPU, list(OPTIMUM))}.values():
            best, law = OPTIMUM[part.method], 1.0
            if part.method == "hyperp":
                law = (part.tokens / CPU.base["tokens"]) ** -0.32 * math.sqrt(CPU.base["depth"] / part.depth)
                best *= math.sqrt(2) ** (part.topk // 4)
            else:
                best *= math.sqrt(2) ** -math.log2(part.depth / CPU.base["depth"])
            for seed in (1, 2):
                # The second seed has one learning rate less, and all its losses are higher.
                for power in range(-3, 4 if seed == 1 else 3):
                    eta0 = best * math.sqrt(2) ** power
                    row = dict(zip(columns, (part.method, part.depth, part.tokens, 1, eta0 * law), strict=False))
                    row |= {"loss": 3 + math.log(eta0 / best) ** 2 + 0.5 * seed, "hidden_size": part.width}
                    writer.writerow(row | {"moe_topk": part.topk, "eta0": eta0, "seed": seed})


def test_report(tmp_path: Path) -> None:
    write_results(tmp_path / "results.csv")
    found = find(parts(CPU, list(OPTIMUM)), tmp_path / "results.csv")
    assert {entry.part.axis for entry in found} == {"width", "depth", "tokens", "K"}
    for entry in found:
        assert entry.optimum is not None, entry.why
    lines = report(found).splitlines()
    summary = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[-6:]}
    assert summary["hyperp"] == ["0.00", "0.00", "0.00", "2.00", "0.32 +- 0.00"]
    assert summary["adamw"] == ["0.00", "2.00", "0.00", "0.00", "0.00 +- 0.00"]
    (deepest,) = [line for line in lines if line.startswith("| layers | 8 |") and "0.002 " in line]
    assert "| -2.00 |" in deepest


def test_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "results.csv")
    main(["--report-only", "--methods", "adamw", "--csv", str(tmp_path / "results.csv")])
    shown = capsys.readouterr().out
    assert "### adamw" in shown
    assert "hyperp" not in shown
    with pytest.raises(UsageError, match="leave --report-only out"):
        main(["--report-only", "--methods", "adamw", "--csv", str(tmp_path / "none.csv")])
