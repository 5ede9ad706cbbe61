"""Reports without a browser: what is read, drawn, compared, escaped and refused."""

from __future__ import annotations

import html
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from megatron_hyperp import estimate
from megatron_hyperp.errors import UsageError
from megatron_hyperp.reporting import figures, heatmaps, tables
from megatron_hyperp.reporting.drawing import amount, colours, short, spread
from megatron_hyperp.reporting.page import write
from megatron_hyperp.reporting.runs import load_run, load_runs, summarize
from tests.commands import run_here
from tests.written_run import STEP_TOKENS, write_run
from tools.report import main


def text_of(page: str) -> str:
    """What a reader sees of HTML."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


def cells(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", table)
    return [[text_of(cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are set up and not drawn, which takes seconds for a page."""

    def savefig(self: Figure, output: Any, **_: Any) -> None:
        content = b"\x89PNG"
        output.write(content) if hasattr(output, "write") else Path(output).write_bytes(content)

    monkeypatch.setattr(Figure, "savefig", savefig)


def test_page_of_several_runs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "hyperp", layers=4),
        write_run(tmp_path / "adamw", optimizer="adamw"),
        write_run(tmp_path / "experts", experts=8),
    ]
    files = write(load_runs(folders), tmp_path / "out" / "compare.html")
    assert [file.name for file in files] == ["compare.html", "compare.png", "compare-layers.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files[1:])
    page = files[0].read_text()
    text = text_of(page)
    for title in ("Summary", "Training", "Stability indicators", "Expert load", "Alarms", "Configuration", "profile"):
        assert title in text
    assert "Missing" not in text
    assert "<script" not in page
    # Nothing but data in the page itself and places in it.
    addresses = re.findall(r"(?:src|href)='([^']*)'", page)
    assert len(addresses) > 30
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert "url(" not in page


def test_summary_has_what_the_run_amounts_to(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", layers=4), "a")
    assert run.size is not None
    model = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["model"]
    assert (run.size.layers, run.size.width) == (4, model["hidden_size"])
    shape = type("Shape", (), model)
    assert run.size.flops_per_token == estimate.train_flops_per_token(shape)
    head, row = cells(tables.summary([run]))
    shown = dict(zip(head, row, strict=True))
    assert run.tokens == 50 * STEP_TOKENS
    assert shown["tokens"] == "205K"
    assert float(shown["FLOPs"]) == pytest.approx(run.size.flops_per_token * run.tokens, rel=1e-2)
    assert shown["best held-out loss"] == "4.7000"
    assert shown["last training loss"] == "4.6000"
    assert shown["largest drift"] == "3.0e-08"
    # Layer 3 of 0..3 in row 5.
    assert shown["largest Z: attention"] == "8.0"
    assert shown["largest Z: router"] == tables.ABSENT
    assert shown["training time"] == "3:25"
    assert shown["alarms"] == "2"
    assert summarize(run).startswith("held-out loss 7.600 -> 4.700 (62% of its first value); 204,800 tokens in 50")


def test_losses_over_flops_are_those_over_tokens(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a"), "a")
    over_tokens, over_flops = figures.loss_panels([run])
    assert run.size is not None
    held_out, dear = (panel.lines[-1].points() for panel in (over_tokens, over_flops))
    assert [(run.size.flops_per_token * at, loss) for at, loss in held_out[1:]] == dear
    assert over_tokens.lines[0].faint
    assert not over_tokens.lines[1].faint


def test_heatmap_is_layers_over_tokens_on_a_common_scale(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, layers=layers), name) for name, layers in (("a", 2), ("b", 4))]
    heats = [heatmaps.heat(run, "attention_z") for run in runs]
    first, second = heats
    assert first is not None
    assert second is not None
    assert second.values.shape == (4, 5)
    assert second.values[3, 0] == 4.0
    assert first.edges[-1] == 50 * STEP_TOKENS
    assert len(first.edges) == 6
    scale = heatmaps.common_scale([first.values, second.values])
    assert (scale.low, scale.high, scale.log) == (0.0, 8.0, False)
    assert heatmaps.heat(runs[0], "mlp_outliers") is None
    assert heatmaps.common_scale([10.0**-second.values]).log
    assert heatmaps.indicators(runs)[:2] == ["attention_z", "output_z"]


def test_long_runs_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", rows=700), "a")
    found = heatmaps.heat(run, "attention_z")
    assert found is not None
    assert found.values.shape[1] <= heatmaps.MOST_COLUMNS
    assert found.values[0, -1] == 700.0
    assert found.edges[-1] == 7000 * STEP_TOKENS


def test_expert_loads(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", layers=3, experts=8), "a")
    loads = heatmaps.load_at_end(run)
    assert loads is not None
    assert loads.shape == (3, 8)
    assert loads.argmax() == 16
    over_time = heatmaps.load_over_time(run)
    assert over_time is not None
    layer, found = over_time
    assert layer == 3
    assert found.values[0] == pytest.approx([loads[2, 0]] * 5)
    assert heatmaps.load_at_end(load_run(write_run(tmp_path / "b"), "b")) is None


def test_alarms_of_one_rule_are_one_row(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    table = tables.alarms(runs)
    assert table is not None
    assert cells(table)[1] == ["a", "loss > 1 * smoothed", "2", "10", "20", "loss is 20"]
    assert len(cells(table)) == 3
    everything = tables.events(runs)
    assert everything is not None
    assert [row[3] for row in cells(everything)[1:]] == ["alarm"] * 4 + ["saved"] * 2


def test_settings_that_differ_come_first_and_are_marked(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", layers=4, optimizer="adamw")])
    part, everything, count = tables.settings(runs)
    assert part is not None
    assert everything is not None
    rows = {row[0].replace(" ", ""): row[1:] for row in cells(part)[1:]}
    assert rows["optimizer.optimizer"] == ["hyperp", "adamw"]
    assert rows["model.num_layers"] == ["2", "4"]
    assert "training.seed" not in rows
    assert part.count("class='differs'") == everything.count("class='differs'") == count == len(rows)
    whole = cells(everything)[1:]
    assert len(whole) > 2 * count
    assert whole[:count] == cells(part)[1:]
    same = load_runs([write_run(tmp_path / "c"), write_run(tmp_path / "d")])
    assert tables.settings(same)[0] is None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """One row, no stability rows, no held-out loss, a null loss, no config, no events: a page all the same."""
    bare = tmp_path / "bare"
    bare.mkdir()
    row = {"iteration": 1, "tokens": 4096, "loss": None, "lr": 0.1, "grad_norm": math.nan, "tokens_per_s": 10.0}
    (bare / "metrics.jsonl").write_text(json.dumps(row) + '\n{"iteration": 2, "tok')
    (bare / "config.yaml").write_text("model: [")
    (bare / "profile").mkdir()
    (bare / "profile" / "rank0.json").write_text("{")
    files = write(load_runs([bare]), tmp_path / "one.html")
    assert [file.name for file in files] == ["one.html", "one.png"]
    text = text_of(files[0].read_text())
    for said in ("no stability indicators", "no held-out loss", "no finite training loss", "config.yaml is not YAML"):
        assert f"bare: {said}" in text
    assert "rank0.json cannot be read" in text
    assert "Nothing is on record" in text
    assert "No run has a readable config.yaml" in text
    assert summarize(load_run(bare, "bare")) == "no finite loss yet"
    # Beside a whole run it is left out of what it lacks.
    both = write(load_runs([bare, write_run(tmp_path / "whole")]), tmp_path / "both.html")
    assert "Only one run tells its settings" in text_of(both[0].read_text())


def test_config_of_another_version(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["model"]["invented"] = 1
    del content["moe"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    run = load_run(folder, "a")
    assert run.notes == []
    assert run.size is not None
    content["model"]["num_layers"] = "many"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    run = load_run(folder, "a")
    assert run.size is None
    assert "num_layers" in run.notes[0]


@pytest.mark.usefixtures("undrawn")
def test_files_cannot_inject_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    folder = write_run(tmp_path / "<b>$x$")
    event = {"iteration": evil, "time": "soon", "kind": evil, "message": evil}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n[1]\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {evil: evil}}))
    (folder / "profile" / "rank0.json").write_text(json.dumps([{"operation": evil, "calls": evil, "self_ms": evil}]))
    page = write(load_runs([folder]), tmp_path / "page.html")[0].read_text()
    assert "<img src=x" not in page
    assert "<b>" not in page
    assert text_of(page).count("onerror=alert(1)") >= 6


def test_names_are_the_shortest_that_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / path) for path in ("a/d8", "b/d8", "b/d4")]
    assert [run.name for run in load_runs(folders)] == ["a/d8", "b/d8", "b/d4"]
    assert [run.name for run in load_runs(folders[1:])] == ["d8", "d4"]
    with pytest.raises(UsageError, match="given twice"):
        load_runs([folders[0], folders[0]])


def test_labels_are_moved_apart_within_the_panel() -> None:
    heights = spread([0.0, 0.01, 0.5, 0.99, 1.0], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(heights))
    assert heights[0] == 0.0
    assert heights[2] == 0.5
    assert max(heights) == 1.0
    assert short("a-very-long-name-of-a-run", 11) == "a-ver…a-run"
    assert len(set(colours(12))) == 12
    assert [amount(value) for value in (0.015, 999, 1500, 10.4e9)] == ["0.015", "999", "1.5K", "10.4B"]


@pytest.mark.usefixtures("undrawn")
def test_tool_writes_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    done = run_here(main, folder, capsys=capsys)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in folder.glob("report*")} == {"report.html", "report.png", "report-layers.png"}
    assert done.stdout.startswith("a: held-out loss 7.600")


def test_tool_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case raises what the command line prints; one of them is run as a command."""
    folder = write_run(tmp_path / "a")
    cases: dict[str, list[str]] = {
        "has no metrics.jsonl": [str(tmp_path / "nothing")],
        "give a folder, or a file that ends in .html": [str(folder), "--output", str(tmp_path / "x.png")],
        "cannot be written": [str(folder), "--output", str(folder / "metrics.jsonl" / "x.html")],
    }
    for said, words in cases.items():
        with pytest.raises(UsageError, match=re.escape(said)):
            main(words)
    for content, said in (("", "is empty"), ('"text"\n', "does not hold rows"), ("\xff", "does not hold rows")):
        (folder / "metrics.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(UsageError, match=said):
            main([str(folder)])
    refused = run_here(main, folder, capsys=capsys)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
