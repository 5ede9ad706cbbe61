"""Indicators against plain computations; alarms; phases; what becomes of broken sinks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.observing import turned
from megatron_hyperp.parameters import GROUPS, group_of
from megatron_hyperp.training.alarms import METRICS, Alarms, parse_alarm
from megatron_hyperp.training.logging import InBackground, JsonLines
from megatron_hyperp.training.phases import Phases
from megatron_hyperp.training.profiling import parse_range
from megatron_hyperp.training.stability import attention_z, outliers, sampled
from tests.toy import one_rank, toy_config, trained, write_corpus


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_attention_z_is_that_of_all_queries_of_a_short_sequence(length: int, heads: int, groups: int) -> None:
    query, key = draw(length, 2, heads, 8), draw(length, 2, groups, 8)
    total, count = attention_z(query, key, 0.3)
    repeated = key.repeat_interleave(heads // groups, dim=2)
    logits = 0.3 * torch.einsum("qbhd,kbhd->bhqk", query, repeated)
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    expected = torch.logsumexp(logits, dim=-1).square()
    assert count == expected.numel()
    assert float(total) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_long_sequences_are_sampled_evenly_up_to_their_end() -> None:
    positions = sampled(1000, 64, torch.device("cpu"))
    assert len(set(positions.tolist())) == 64
    assert positions.max() == 999
    gaps = positions.sort().values.diff()
    assert gaps.min() >= 15
    assert gaps.max() <= 16
    assert sorted(sampled(5, 64, torch.device("cpu")).tolist()) == [0, 1, 2, 3, 4]


def test_outliers_are_beyond_five_sigma_of_their_token() -> None:
    x = torch.zeros(3, 1, 100)
    x[0, 0, 0] = 1.0  # sigma is 0.1, mean 0.01
    x[1, 0, :50] = 1.0
    assert int(outliers(x)) == 1
    assert int(outliers(1000 * x + 7)) == 1


@pytest.mark.parametrize("angle", [1e-6, 0.01, 1.0, 2.0])
def test_angles(angle: float) -> None:
    weight = torch.tensor([3.0, 0.0], dtype=torch.float64)
    after = 0.5 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    update = (0.9 * weight - after) / 0.1
    products = torch.stack([weight @ weight, weight @ update, update @ update])[None]
    # Nearly parallel to W, the update leaves few digits to the smallest angle.
    assert float(turned(products, shrink=0.9, move=0.1)) == pytest.approx(angle, rel=1e-3 if angle < 1e-3 else 1e-8)
    assert float(turned(torch.zeros(1, 3), shrink=1.0, move=0.1)) == 0.0


def test_every_role_has_a_group() -> None:
    names = {
        ("embedding.word_embeddings.weight", "embedding"): "embedding",
        ("output_layer.weight", "output"): "output",
        ("decoder.layers.1.self_attention.linear_qkv.weight", "hidden"): "attention",
        ("decoder.layers.1.self_attention.linear_qkv.weight[head 3]", "hidden"): "attention",
        ("decoder.layers.1.mlp.linear_fc1.weight", "hidden"): "mlp",
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", "hidden"): "mlp",
        ("decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight", "hidden"): "experts",
        ("decoder.layers.1.mlp.router.weight", "router"): "router",
        ("decoder.layers.1.self_attention.q_layernorm.weight", "vector"): "vectors",
    }
    assert {pair: group_of(*pair) for pair in names} == names
    assert set(names.values()) == set(GROUPS)


# Alarms


@pytest.mark.parametrize(
    ("text", "value", "sounds"),
    [
        ("attention_z > 200", 201.0, True),
        ("attention_z > 200", 200.0, False),
        ("attention_z >= 200:stop", 200.0, True),
        ("attention_z<1e-3", 1e-4, True),
        ("attention_z <= 1e-3 : save", 1e-2, False),
        ("attention_z > 200", math.nan, True),
        ("attention_z < 0", math.inf, True),
        ("attention_z > 1.5 * smoothed", 1e9, False),  # nothing to compare with yet
    ],
)
def test_alarms_sound_beyond_their_threshold(text: str, value: float, sounds: bool) -> None:
    assert bool(Alarms([text]).check({"iteration": 3, "attention_z": value})) == sounds
    assert not Alarms([text]).check({"iteration": 3, "loss": 1e9})


def test_a_relative_alarm_follows_the_smoothed_metric() -> None:
    alarms = Alarms(["loss > 1.5 * smoothed: stop"])
    assert not [alarms.check({"loss": loss}) for loss in (10.0, 9.0, 8.0, 10.0) if alarms.check({"loss": loss})]
    [(alarm, line)] = alarms.check({"loss": 15.0})
    assert alarm.action == "stop"
    assert line == "alarm: loss is 15 (loss > 1.5 * smoothed: stop)"
    # What is not finite does not enter the smoothed value.
    assert alarms.check({"loss": math.nan})
    assert alarms.check({"loss": 16.0})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss", "cannot be read"),
        ("loss > big", "big is no finite number"),
        ("loss > nan", "nan is no finite number"),
        ("los > 3", f"there is no metric los; there are {', '.join(METRICS)}"),
        ("loss > 3 : explode", "there is no action explode; there are warn, save, stop"),
        ("loss = 3", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_an_alarm_that_says_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_alarm(text)


@pytest.mark.parametrize("text", ["", "3", "0:4", "5:4", "a:b", "1:2:3", "-1:4"])
def test_a_range_to_profile_has_two_iterations(text: str) -> None:
    with pytest.raises(UsageError, match="give FIRST:LAST"):
        parse_range(text)


# Phases


def test_an_inner_phase_is_taken_out_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    phases = Phases()
    with phases.phase("forward-backward"), phases.phase("data"):
        pass
    assert phases.seconds["data"] == 4.0
    assert phases.seconds["forward-backward"] == 2.0 + 1.0
    assert phases.describe().startswith("20.0 s: forward-backward 3.0 s (15%), data 4.0 s (20%), other 13.0 s")


# Sinks


class Recorder:
    """A sink that breaks or dawdles."""

    def __init__(self, *, breaks: bool = False, seconds: float = 0.0) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.closed = False
        self._breaks, self._seconds = breaks, seconds

    def write(self, row: Mapping[str, Any]) -> None:
        time.sleep(self._seconds)
        if self._breaks:
            raise ConnectionError("the service is gone")
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def test_rows_reach_a_sink_in_order() -> None:
    sink = Recorder(seconds=0.001)
    background = InBackground("sink", sink)
    for iteration in range(20):
        background.write({"iteration": iteration})
    background.close()
    assert [row["iteration"] for row in sink.rows] == list(range(20))
    assert sink.closed


def test_a_slow_sink_holds_nobody_up() -> None:
    background = InBackground("sink", Recorder(seconds=0.2))
    started = time.monotonic()
    for iteration in range(10):
        background.write({"iteration": iteration})
    assert time.monotonic() - started < 0.2


def test_a_broken_sink_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Recorder(breaks=True)
    background = InBackground("wandb", sink)
    for iteration in range(3):
        background.write({"iteration": iteration})
    background.close()
    assert not sink.closed
    assert capsys.readouterr().err == "wandb stopped (the service is gone); the run goes on without it\n"


def test_a_sink_that_does_not_finish_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_hyperp.training.logging.SECONDS_TO_CLOSE", 0.05)
    background = InBackground("wandb", Recorder(seconds=5.0))
    background.write({"iteration": 1})
    background.close()
    assert "wandb does not finish" in capsys.readouterr().err


def test_rows_are_json_whatever_their_numbers(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, fresh=True)
    sink.write({"iteration": 1, "loss": math.nan, "z_per_layer": [1.0, math.inf], "loads": [[1, 2], [math.nan, 3]]})
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"iteration": 1, "loss": None, "z_per_layer": [1.0, None], "loads": [[1, 2], [None, 3]]}


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    from megatron_hyperp.config import Config, LoggingConfig
    from megatron_hyperp.training.logging import EVENTS_FILE, MetricsWriter, read_events

    config = Config(logging=LoggingConfig(run_dir=str(tmp_path)))
    writer = MetricsWriter(config, active=True, fresh=True)
    writer.event(7, "alarm", "loss is high")
    writer.close()
    MetricsWriter(config, active=False, fresh=True).event(8, "alarm", "of another rank")
    assert json.loads((tmp_path / EVENTS_FILE).read_text())["message"] == "loss is high"
    [event] = read_events(tmp_path)
    assert (event["iteration"], event["kind"]) == (7, "alarm")


def test_gains_that_do_not_learn_bound_the_logits_of_attention(tmp_path: Path) -> None:
    device.adapt_megatron()
    prefix, keys = write_corpus(tmp_path), 64
    fields = {"train_iters": 5, "stability_interval": 5, "num_layers": 2, "lr": 0.1, "quiet": True}
    with one_rank():
        trainer, rows = trained(toy_config(prefix, tmp_path, qk_norm_lr_mult=0.0, **fields))
        learning, _ = trained(toy_config(prefix, tmp_path, **fields))
    for each, fixed in ((trainer, True), (learning, False)):
        gains = [value for name, value in each.chunks[0].named_parameters() if "q_layer" in name or "k_layer" in name]
        assert len(gains) == 4
        assert all(bool((value == 1).all()) == fixed for value in gains)
    found = next(row["attention_z"] for row in rows if "attention_z" in row)
    assert found < (math.sqrt(128) + math.log(keys)) ** 2
