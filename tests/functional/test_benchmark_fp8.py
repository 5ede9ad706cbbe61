"""The benchmark of FP8 trains what is missing; and, slowly, what FP8 promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fp8.run import KEY, append, main, read
from benchmarks.lr_transfer.plan import PRESETS
from benchmarks.lr_transfer.run import prepare
from megatron_hyperp.errors import UsageError
from tests import tolerances
from tests.functional.launch import run_benchmark
from tests.run_distributed import run_distributed
from tests.toy import VOCABULARY, write_corpus

# Of the loss without FP8.
CLOSE = 0.02


@pytest.mark.matrix
def test_it_trains_what_is_missing_and_reports_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--precision", "bf16", "--iterations", "2", "--output", str(tmp_path)]
    known = {"case": "none", "precision": "bf16", "seed": 1234, "iterations": 2}
    append(tmp_path / "losses.csv", [{**known, "loss": 4.0, "held_out": 5.0, "radius_drift": 0.0, "skipped": 0}])
    with pytest.raises(UsageError, match=r"^1 trainings are not in .*losses\.csv; give --data-path and --tokenizer-m"):
        main([*words, "--cases", "none", "sphere"])
    corpus = ["--data-path", write_corpus(tmp_path, documents=1000), "--tokenizer-model", f"null:{VOCABULARY}"]
    run_benchmark(main, *words, *corpus, "--cases", "none", "sphere")
    # What was known, was not trained again.
    none, sphere = read(tmp_path / "losses.csv")
    assert [none[name] for name in (*KEY, "loss")] == ["none", "bf16", "1234", "2", "4.0"]
    assert sphere["case"] == "sphere"
    assert {row["kind"] for row in read(tmp_path / "weights.csv")} == {
        f"linear_{k}" for k in ("qkv", "proj", "fc1", "fc2")
    }
    main([*words, "--cases", "none", "sphere"])
    table = capsys.readouterr().out
    assert "| none | 4.0000 | 1.0000 | 5.0000 | 1.0000 | 0.0e+00 |" in table
    assert f"| sphere | {float(sphere['loss']):.4f} | {float(sphere['loss']) / 4:.4f} |" in table


def train_all(data: str, tokenizer: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    from benchmarks.fp8.training import start, train

    start()
    options: dict[str, Any] = {"bf16": True, "iterations": 200, "seed": 1234}
    return {case: train(case, data_path=data, tokenizer_model=tokenizer, **options)[0] for case in cases}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_steps_in_fp8_are_as_good_as_in_bf16(tmp_path: Path) -> None:
    data, tokenizer = prepare(tmp_path, PRESETS["tiny"])
    [found] = run_distributed(train_all, 1, str(data), str(tokenizer), ["none", "tensorwise", "rowwise"])
    for result in found.values():
        assert result["loss"] == pytest.approx(found["none"]["loss"], rel=CLOSE)
        assert result["held_out"] == pytest.approx(found["none"]["held_out"], rel=CLOSE)
        assert result["radius_drift"] < tolerances.RADIUS_DRIFT
        assert result["skipped"] == 0
