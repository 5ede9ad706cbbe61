"""The mean of checkpoints, matrices back on their spheres; flags without effect are refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hyperp.config import Config
from megatron_hyperp.convert.averaging import AverageSource, newest_checkpoints, radius_of
from megatron_hyperp.convert.convert import convert
from megatron_hyperp.convert.hyperp import HyperPSource, write_weights
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import preflight
from megatron_hyperp.training.schedule import Schedule
from tests.integration.test_convert_huggingface import job
from tests.random_source import RandomSource, model_config, write_random

PROJ, GAIN = "decoder.layers.1.self_attention.linear_proj.weight", "decoder.final_layernorm.weight"


class Shifted(RandomSource):
    """The same weights plus a number."""

    shift = 0.0

    def read(self, name: str) -> torch.Tensor:
        return super().read(name) + self.shift


def write_run(folder: Path, config: Config, shifts: list[float]) -> Path:
    """Checkpoints of iterations 1, 2, ... of a run."""
    folder.mkdir()
    for number, shift in enumerate(shifts, start=1):
        source = Shifted(copy.deepcopy(config))
        source.shift = shift
        (folder / "one").mkdir()
        write_weights(folder / "one", source, layout=Layout(), dtype=None, advance=lambda _: None)
        (folder / "one" / "iter_0000000").rename(folder / f"iter_000000{number}")
        shutil.rmtree(folder / "one")
    return folder


@pytest.mark.parametrize("optimizer", ["hyperp", "adamw"])
def test_the_mean_of_the_newest(tmp_path: Path, optimizer: str) -> None:
    config = model_config(optimizer=optimizer)
    folder = write_run(tmp_path / "run", config, [5.0, 0.1, 0.3])
    average, plain = AverageSource(newest_checkpoints(folder, 2)), RandomSource(config)
    torch.testing.assert_close(average.read(GAIN), plain.read(GAIN) + 0.2)
    mean = plain.read(PROJ) + 0.2
    if optimizer == "hyperp":
        radius = radius_of(average, PROJ)
        assert radius == pytest.approx((64 / 3) ** 0.5)
        mean *= radius / mean.norm()
    torch.testing.assert_close(average.read(PROJ), mean)
    convert(job(source="hyperp", target="hyperp", input=folder, output=tmp_path / "mean", average=2, verify=True))
    written = HyperPSource(tmp_path / "mean")
    assert written.reader.common["weights_only"] is True
    torch.testing.assert_close(written.read(PROJ), mean)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", model_config(), [0.1, 0.2])
    with pytest.raises(UsageError, match=r"--average 0 needs 2 or more"):
        convert(job(source="hyperp", target="hyperp", input=folder, output=tmp_path / "mean", average=0))
    with pytest.raises(UsageError, match=r"--average 3 needs 2 or more.*there are: iter_0000001, iter_0000002"):
        newest_checkpoints(folder, 3)
    sources = newest_checkpoints(folder, 2)
    sources[0].config.optimizer.radius_scale = 2.0
    with pytest.raises(UsageError, match="are of runs with other settings"):
        AverageSource(sources)
    split = write_run(tmp_path / "split", model_config(matrix_split="head"), [0.1, 0.2])
    with pytest.raises(UsageError, match="average runs with fused"):
        AverageSource(newest_checkpoints(split, 2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": "hf", "radius": "from-weights"}, "--radius from-weights needs --to hyperp"),
        ({"source": "hf", "average": 2}, "--average needs --from hyperp"),
        ({"average": 2, "radius": "from-weights"}, "leave out --radius"),
        ({"target": "hf", "weights_only": True}, "--weights-only needs --from and --to hyperp"),
        ({"shard_bytes": 1}, "--max-shard-size needs --to hf"),
        ({"tokenizer": "x.model"}, "--tokenizer needs --to hf"),
        ({"config": "x.yaml"}, "--config needs --from archscale"),
        ({"target": "hf", "layout": Layout(tp=2)}, "with --to hf give --max-shard-size"),
        ({"layout": Layout(tp=4)}, "--tp 4 does not divide the key-value heads, 2"),
    ],
)
def test_flags_without_effect(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    write_random(tmp_path / "ours")
    kinds = {"source": "hyperp", "target": "hyperp", **fields}
    with pytest.raises(UsageError, match=words):
        convert(job(input=tmp_path / "ours", output=tmp_path / "out", **kinds))
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_weights_alone_have_no_schedule_to_keep(tmp_path: Path) -> None:
    write_random(tmp_path / "ours")
    config = model_config(load=str(tmp_path / "ours"))
    folder = preflight._checkpoint_to_load(config)
    resolved, course = preflight.planned(config, 1, None, folder)
    assert (resolved, course) == (config.resolve(), Schedule.of(config.resolve()))
    config.optimizer.use_checkpoint_opt_param_scheduler = True
    with pytest.raises(UsageError, match=r"needs a checkpoint of a training, but .* gives its weights alone"):
        preflight.planned(config, 1, None, folder)


def test_radii_from_weights_need_a_checkpoint_that_has_them(tmp_path: Path) -> None:
    write_random(tmp_path / "ours", radius="from-weights")
    config = model_config(radius="from-weights")
    for load in (None, str(tmp_path / "ours")):
        config.checkpoint.load = load
        with pytest.raises(UsageError, match="needs --load or --pretrained-checkpoint of a checkpoint that has radii"):
            preflight._check_checkpoint(config, Schedule.of(config.resolve()), preflight._checkpoint_to_load(config))
