"""tools/fit_scaling.py on synthetic sweeps: what it prints, draws and writes, and every refusal."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.scaling.groups import group_runs, matching, read_runs
from tests.cases import kept
from tests.commands import run_here
from tools.fit_scaling import main

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "configs" / "quickstart.yaml"
BEST, TOKENS, EXPONENT, BATCH = 0.0553, 1.0e6, 0.41, 2048
Row = dict[str, Any]
# HyperP reaches each loss with this share of the FLOPs of AdamW.
SAVING = 1.5


def best_lr(method: str, depth: int, tokens: float, exponent: float = EXPONENT) -> float:
    law = math.sqrt(2 / depth) * (tokens / TOKENS) ** -exponent
    return BEST * law if method == "hyperp" else 0.004


def sweep(exponent: float = EXPONENT) -> Iterator[Row]:
    """Seven learning rates for each of six models of two methods; AdamW's loss is 30 F^-0.1 + 1.5."""
    for method in ("hyperp", "adamw"):
        for depth, width, tokens in (
            (2, 64, 2.5e5),
            (2, 64, 1e6),
            (2, 64, 4e6),
            (4, 64, 1e6),
            (8, 64, 1e6),
            (2, 128, 1e6),
        ):
            flops = depth * width**2 * tokens
            compute = flops * SAVING if method == "hyperp" else flops
            best = best_lr(method, depth, tokens, exponent)
            for power in range(-3, 4):
                # A grid that holds the best learning rate, so that the least loss is on the curve.
                lr = best * 2 ** (power / 2)
                loss = 30 * compute**-0.1 + 1.5 + 0.15 * math.log(lr / best) ** 2
                row = {"method": method, "depth": depth, "tokens": round(tokens), "flops": flops, "lr": f"{lr:.10g}"}
                row |= {"loss": f"{loss:.8f}", "hidden_size": width, "heads": width // 16, "status": "finished"}
                yield row | {"run": f"{method}-{depth}-{width}-{tokens}-{power}"}


def write(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sweep") / "sweep.csv", list(sweep()))


def fit(words: str, table: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main([*words.split(), "--csv", str(table), "--json"])
    return json.loads(capsys.readouterr().out)


def chosen(rows: list[Row], **conditions: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in conditions.items())]


# What is found


def test_learning_rates_beside_their_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "sweep.csv", list(sweep(exponent=0.32)))
    document = fit("lr", table, capsys)
    assert (document["fit"], document["csv"], document["token_exponent"]) == ("lr", str(table), 0.32)
    assert document["bases"]["hyperp"] == {"method": "hyperp", "depth": 2.0, "tokens": 2.5e5, "hidden_size": 64.0}
    assert len(document["results"]) == 12
    for result in document["results"]:
        group = result["group"]
        # The column of heads follows from the width.
        assert list(group) == ["method", "depth", "tokens", "hidden_size"]
        expected = best_lr(group["method"], group["depth"], group["tokens"], 0.32)
        assert result["lr"] == pytest.approx(expected, rel=1e-3)
        assert result["ratio"] == pytest.approx(1.0, rel=1e-3)
        assert result["lr_spread"] < 1e-3
        assert (result["runs"], result["refused"]) == (7, None)


def test_the_laws_exponent_may_be_fitted_and_its_base_chosen(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "lr --where method=hyperp hidden_size=64 depth=2 --base tokens=1e6 --token-exponent"
    fitted = fit(f"{words} fit", table, capsys)
    assert fitted["bases"] == {"hyperp": {"method": "hyperp", "depth": 2.0, "tokens": 1e6}}
    assert fitted["token_exponent"] == pytest.approx(EXPONENT, rel=0.01)
    assert [result["ratio"] for result in fitted["results"]] == pytest.approx([1.0] * 3, rel=1e-3)
    given = fit(f"{words} 0.1", table, capsys)
    assert given["results"][2]["law"] == pytest.approx(BEST * 4**-0.1, rel=1e-3)


def marins(rows: Iterable[Row]) -> list[Row]:
    """The runs with best learning rates by Marin's exponents in place of the paper's, for HyperP."""
    result = []
    for row in chosen(list(rows), method="hyperp"):
        law = (row["hidden_size"] / 64) ** -0.345 * (row["tokens"] / TOKENS) ** -0.346
        moved = float(row["lr"]) * BEST * law / best_lr("hyperp", row["depth"], row["tokens"])
        result.append(row | {"lr": f"{moved:.10g}"})
    return result


def test_learning_rates_beside_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = marins(sweep())
    table = write(tmp_path / "sweep.csv", rows)
    by_flag = fit("lr --lr-preset marin-2608", table, capsys)["results"]
    assert [result["ratio"] for result in by_flag] == pytest.approx([1.0] * 6, rel=1e-3)
    assert max(abs(result["ratio"] - 1) for result in fit("lr", table, capsys)["results"]) > 0.1
    # A column says so as well; the preset is of MuonH alone.
    named = write(tmp_path / "named.csv", [row | {"lr_preset": "marin-2608"} for row in rows])
    assert fit("lr", named, capsys)["results"] == by_flag
    both = write(tmp_path / "both.csv", rows + chosen(list(sweep()), method="adamw"))
    assert [result["ratio"] for result in fit("lr --lr-preset marin-2608", both, capsys)["results"]] == pytest.approx(
        [1.0] * 12, rel=1e-3
    )
    main(["lr", "--csv", str(named)])
    assert "(w/w0)^-0.345 (T/T0)^-0.346 (B/B0)^0.5 (marin-2608), from hyperp" in capsys.readouterr().out
    # Without widths there is no law.
    columns = [name for name in rows[0] if name not in ("hidden_size", "heads")]
    one_width = [{name: row[name] for name in columns} for row in chosen(rows, hidden_size=64)]
    narrow = write(tmp_path / "narrow.csv", one_width)
    assert {result["law"] for result in fit("lr --lr-preset marin-2608", narrow, capsys)["results"]} == {None}
    main(["lr", "--csv", str(narrow), "--lr-preset", "marin-2608"])
    assert "the file needs a column hidden_size for it" in capsys.readouterr().out


def test_the_base_of_a_preset(tmp_path: Path) -> None:
    table, base = write(tmp_path / "sweep.csv", marins(sweep())), tmp_path / "base.yaml"
    words = f"--csv {table} --lr-preset marin-2608 --base tokens=1e6 --batch-tokens {BATCH} --write-base {base}"
    main(["lr", *words.split()])
    flags = f"--config {QUICKSTART} {base} --train-iters none --train-tokens 4e6 --depth 4"
    config = arguments.parse(flags.split(), description="").resolve(tokenizer_vocab_size=2048)
    assert config.transfer.lr_preset == "marin-2608"
    factor = (config.model.hidden_size / 64) ** -0.345 * 4**-0.346 * math.sqrt(config.batch_tokens / BATCH)
    assert config.learning_rate().value == pytest.approx(BEST * factor, rel=1e-3)


def test_the_exponent_of_the_tokens(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = fit("tokens", table, capsys)["results"]
    assert [result["model"] for result in results] == [f"{m} depth=2 hidden_size=64" for m in ("adamw", "hyperp")]
    assert [result["exponent"] for result in results] == pytest.approx([0.0, EXPONENT], rel=0.01, abs=1e-3)
    assert [point["tokens"] for point in results[1]["points"]] == [2.5e5, 1e6, 4e6]
    assert (results[1]["paper"], results[1]["refused"]) == (0.32, None)
    assert results[1]["spread"] < 1e-3


def test_loss_over_compute(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adamw, hyperp = fit("flops", table, capsys)["results"]
    assert (adamw["A"], adamw["b"], adamw["C"]) == pytest.approx((30, 0.1, 1.5), rel=0.01)
    assert (hyperp["A"], hyperp["b"], hyperp["C"]) == pytest.approx((30 * SAVING**-0.1, 0.1, 1.5), rel=0.01)
    # Depth 4, width 128 and 4M tokens: different models of the same FLOPs count once.
    assert [point["flops"] for point in adamw["points"]] == [2.048e9, 8.192e9, 16.384e9, 32.768e9]
    assert (adamw["at_edge"], adamw["refused"]) == (0, None)


def test_leverage_of_a_curve_over_itself_is_one(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = fit("leverage --baseline adamw", table, capsys)
    assert document["baseline"] == "adamw"
    for result in document["results"]:
        expected = SAVING if result["method"] == "hyperp" else 1.0
        assert (result["leverage"], result["fitted"]) == pytest.approx((expected, expected), abs=5e-4)
        assert result["baseline_flops"] == pytest.approx(expected * result["flops"], rel=1e-3)
    assert max(result["extrapolation"] for result in document["results"]) == pytest.approx(SAVING, rel=1e-3)


def test_a_group_at_the_edge_is_refused_and_the_others_are_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in sweep() if row["depth"] != 4 or float(row["lr"]) <= best_lr(row["method"], 4, 1e6) * 1.01]
    table = write(tmp_path / "sweep.csv", rows)
    results = fit("lr --where method=hyperp", table, capsys)["results"]
    (refused,) = [result for result in results if result["refused"]]
    assert refused["group"]["depth"] == 4
    assert refused["lr"] is refused["ratio"] is None
    assert "the edge of the grid; add larger learning rates" in refused["refused"]
    main(["lr", "--csv", str(table)])
    shown = capsys.readouterr().out
    assert shown.count("refused: the lowest loss") == 2
    assert "law of hyperp: 0.09763 sqrt(d0/d) (T/T0)^-0.32 sqrt(B/B0), from hyperp depth=2 tokens=250000" in shown
    for words in ("tokens", "flops", "leverage --baseline adamw"):
        main([*words.split(), "--csv", str(table)])
        assert "refused" not in capsys.readouterr().out
    assert fit("flops", table, capsys)["results"][0]["at_edge"] == 1


# What is read


def test_failed_unfinished_and_diverged_runs(tmp_path: Path) -> None:
    rows = chosen(list(sweep()), method="hyperp", depth=4)
    rows[0] |= {"status": "failed"}
    rows[1] |= {"loss": "", "status": ""}
    rows[5] |= {"loss": "", "status": "diverged"}
    rows[6] |= {"loss": "nan"}
    runs = read_runs(write(tmp_path / "sweep.csv", rows))
    assert [math.isfinite(run.loss) for run in runs] == [True, True, True, False, False]
    (group,) = group_runs(runs)
    assert list(group.mean_losses().values())[3:] == [math.inf, math.inf]


def test_seeds_are_of_one_group_and_other_columns_set_groups_apart(tmp_path: Path) -> None:
    rows = [row | {"seed": seed, "moe_topk": topk} for seed in (1, 2) for topk in (2, 4) for row in sweep()]
    runs = read_runs(write(tmp_path / "sweep.csv", rows))
    groups = group_runs(runs)
    assert len(groups) == 24
    assert {len(group.runs) for group in groups} == {14}
    assert "moe_topk" in groups[0].key
    assert len(group_runs(runs, ignored=["moe_topk"])) == 12
    assert {run.values["depth"] for run in matching(runs, ["depth=2", "depth=8", "moe_topk=2.0"])} == {2.0, 8.0}
    assert groups[-1].name(without=["tokens"]) == "hyperp depth=8 hidden_size=64 moe_topk=4"


# What is written


@pytest.mark.parametrize(
    ("words", "suffix", "magic"),
    kept(
        [
            ("lr", "png", b"\x89PNG"),
            ("tokens", "pdf", b"%PDF"),
            ("flops", "svg", b"<?xml"),
            ("leverage --baseline adamw", "png", b"\x89PNG"),
        ],
        {"lr"},
    ),
)
def test_pictures(
    words: str, suffix: str, magic: bytes, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"picture.{suffix}"
    main([*words.split(), "--csv", str(table), "--plot", str(picture)])
    assert picture.read_bytes().startswith(magic)
    assert picture.stat().st_size > 5000
    assert capsys.readouterr().out.endswith(f"wrote {picture}\n")


def test_the_trainer_takes_the_written_base(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "base.yaml"
    words = "lr --where method=hyperp depth=2 hidden_size=64 --base tokens=1e6 --token-exponent fit"
    document = fit(f"{words} --batch-tokens {BATCH} --hidden-size 64 --write-base {path}", table, capsys)
    lr = document["results"][1]["lr"]
    size = "--vocab-size 64 --depth 2 --aspect-ratio 32 --global-batch-size 16 --train-iters none --train-tokens"
    flags = ["--config", str(QUICKSTART), str(path), *size.split()]
    base = arguments.parse([*flags, "1e6"], description="").resolve()
    assert base.learning_rate().value == base.eta0 == lr
    assert base.transfer.token_exponent == document["token_exponent"] == pytest.approx(EXPONENT, rel=0.01)
    assert (base.transfer.base_depth, base.transfer.base_hidden_size, base.transfer.base_batch_tokens) == (2, 64, BATCH)
    assert base.batch_tokens == BATCH
    longer = arguments.parse([*flags, "4e6"], description="").resolve()
    assert longer.learning_rate().value == pytest.approx(lr * 4**-EXPONENT, rel=0.01)


def test_the_base_takes_batch_and_width_from_the_file(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row | {"global_batch_size": 16, "seq_length": 128} for row in chosen(list(sweep()), method="adamw", depth=8)
    ]
    path = tmp_path / "base.yaml"
    fit(f"lr --write-base {path}", write(tmp_path / "sweep.csv", rows), capsys)
    base = arguments.load_yaml(path).transfer
    assert (base.base_depth, base.base_hidden_size, base.base_tokens, base.base_batch_tokens) == (8, 64, 1e6, BATCH)
    assert base.token_exponent == 0.32
    assert base.eta0 == pytest.approx(0.004, rel=1e-3)


# Refusals: exit code 2 and one line


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    done = run_here(main, *argv, capsys=capsys)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


ONE = "lr --where method=hyperp depth=8"
REFUSALS = [
    ("lr --where lr=0.1", r"no run has lr=0\.1; there are lr=0\.001"),
    ("lr --where depth", r"the condition 'depth' is not of the form COLUMN=VALUE, say depth=2"),
    ("lr --where width=2", r"there is no column 'width'; there are method, depth, .*hidden_size"),
    ("lr --base depth=3", r"no run has depth=3; there are depth=2, 4, 8"),
    ("lr --ignore width", r"there is no column 'width'"),
    (
        "lr --ignore hidden_size heads",
        r"FLOPs from 8\.192e\+09 to 3\.277e\+10, so they are not of one model; add a col",
    ),
    ("lr --token-exponent x", r"--token-exponent is 'x'; give a number of at least 0, or fit"),
    ("lr --token-exponent -1", r"--token-exponent is '-1'; give"),
    ("lr --token-exponent nan", r"--token-exponent is 'nan'; give"),
    ("lr --token-exponent fit", r"takes one model .* and 2 are, of: adamw depth=2 .*; hyperp .*; choose by --where"),
    ("lr --write-base base.yaml", r"writes the base of one method, and there are adamw, hyperp; choose by --where"),
    (f"{ONE} --write-base base.yaml", r"does not tell the tokens per batch, .*; give --batch-tokens, or a column"),
    (f"{ONE} --batch-tokens 8", r"--batch-tokens goes into the file of --write-base; give that, or leave it out"),
    (
        f"{ONE} --write-base /none/b.yaml --batch-tokens 8",
        r"--write-base /none/b\.yaml cannot be written \(No such file",
    ),
    (f"{ONE} --write-base b.yaml --batch-tokens 8 --hidden-size 8", r"--hidden-size 8 contradicts .*, which says 64"),
    (f"{ONE} --write-base b.yaml --batch-tokens 0", r"argument --batch-tokens: .*\(--help lists the flags\)"),
    ("lr --plot picture.gif", r"--plot picture\.gif must end in one of \.png, \.pdf, \.svg"),
    ("flops --plot /none/p.png", r"--plot /none/p\.png cannot be written \(No such file"),
    (
        "tokens --where depth=8",
        r"has no model with two numbers of tokens; its groups are adamw depth=8 .*; hyperp depth",
    ),
    ("flops --where depth=8", r"allows no fit; of the first of 2: L = A F\^-b \+ C takes 4 points of different FLOPs"),
    ("leverage", r"leverage needs a --baseline, one of adamw, hyperp"),
    ("leverage --baseline sgd", r"--baseline sgd is no method of the file; there are adamw, hyperp"),
    ("leverage --baseline adamw --where depth=8", r"the baseline adamw has no law: L = A F\^-b \+ C takes 4"),
    ("tokens --write-base b.yaml", r"--write-base has no effect on tokens, only on lr; leave it out"),
    ("lr --baseline adamw", r"--baseline has no effect on lr, only on leverage; leave it out"),
    ("fit", r"argument fit: invalid choice: 'fit'"),
]


@pytest.mark.parametrize(("words", "message"), REFUSALS, ids=[words for words, _ in REFUSALS])
def test_what_is_refused(words: str, message: str, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*words.split(), "--csv", str(table)], capsys)
    assert re.search(message, line), line


FILES = [
    ("", r"has no column method, depth, tokens, flops, lr, loss; its first line must name"),
    ("method,depth,tokens,flops,lr\n", r"has no column loss; its first line must name method, depth"),
    ("method,depth,tokens,flops,lr,loss\n", r"has no run with a loss; wait for the sweep's first one"),
    ("method,depth,tokens,flops,lr,loss\na,2,1,1,0.1,\n", r"has no run with a loss"),
    ("method,depth,tokens,flops,lr,loss\na,2,1,1,x,3\n", r"line 2: lr is 'x'; it must be a number above 0"),
    ("method,depth,tokens,flops,lr,loss\na,2,-1,1,0.1,3\n", r"line 2: tokens is '-1'; it must be"),
    ("method,depth,tokens,flops,lr,loss\na,2,1,1,0.1,high\n", r"line 2: loss is 'high'; it must be a number, or empty"),
    ("method,depth,tokens,flops,lr,loss\na,2,1,1,0.1,3\n", r"allows no fit; of the first of 1: a parabola takes 3"),
    ("\xff", r"cannot be read as CSV"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[message for _, message in FILES])
def test_files_that_are_refused(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.csv"
    path.write_bytes(content.encode("latin-1"))
    line = refused(["lr", "--csv", str(path)], capsys)
    assert str(path) in line
    assert re.search(message, line), line


def test_a_table_that_is_absent_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["lr", "--csv", str(tmp_path / "absent.csv")], capsys)
    assert line.startswith(f"{tmp_path / 'absent.csv'} cannot be read as CSV ([Errno 2] No such file")


def test_a_width_law_needs_a_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{name: row[name] for name in ("method", "depth", "tokens", "flops", "lr", "loss")} for row in sweep()]
    table = write(tmp_path / "sweep.csv", chosen(rows, method="adamw", depth=8))
    words = f"lr --csv {table} --write-base {tmp_path / 'base.yaml'} --batch-tokens 2048"
    assert "does not tell the width, on which adamw's learning rate depends" in refused(words.split(), capsys)
    main([*words.split(), "--hidden-size", "64"])
    assert arguments.load_yaml(tmp_path / "base.yaml").transfer.base_hidden_size == 64
