"""What a run folder holds, read for a report; what it lacks is noted rather than refused."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments, estimate, yaml_files
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.logging import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, kind_of, read_events, read_metrics
from megatron_hyperp.training.profiling import FOLDER as PROFILE_FOLDER

Row = dict[str, Any]
PER_LAYER = "_per_layer"


@dataclass(frozen=True, slots=True)
class Size:
    """How large a run's model is.

    Attributes:
        layers: transformer layers.
        width: hidden size.
        parameters: of all matrices.
        active: of those that a token passes through.
        flops_per_token: forward and backward.
    """

    layers: int
    width: int
    parameters: int
    active: int
    flops_per_token: int


@dataclass(frozen=True, slots=True)
class Run:
    """A run, as its folder tells it.

    Attributes:
        name: to show, distinct among the runs of a report.
        folder: of the run.
        training: rows of training, in order.
        evaluations: rows of held-out losses.
        tests: rows of losses on the test set, at the end of the run.
        stability: rows of stability indicators.
        events: alarms, checkpoints, resumptions.
        settings: of the resolved config, by ``section.key``; None without a readable one.
        size: None where the config does not tell it.
        profiles: top operations by the rank that was profiled.
        notes: what is missing.
    """

    name: str
    folder: Path
    training: list[Row]
    evaluations: list[Row]
    tests: list[Row]
    stability: list[Row]
    events: list[Row]
    settings: dict[str, Any] | None
    size: Size | None
    profiles: dict[str, list[Row]]
    notes: list[str]

    def values(self, key: str) -> list[float]:
        """Return the finite values of a metric over all rows."""
        rows = (*self.training, *self.evaluations, *self.tests, *self.stability)
        return [value for value in (number(row.get(key)) for row in rows) if math.isfinite(value)]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return tokens and values of a metric: of the training or evaluation rows, else of the stability rows."""
        for rows in (self.training, self.evaluations, self.stability):
            found = [row for row in rows if key in row]
            if found:
                return [number(row.get("tokens")) for row in found], [number(row[key]) for row in found]
        return [], []

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return max((number(row.get("tokens"), 0.0) for row in (*self.training, *self.evaluations)), default=0.0)

    @property
    def seconds(self) -> float:
        """Time of training steps, from tokens and throughput; evaluations and checkpoints do not count."""
        total, before = 0.0, 0.0
        for row in self.training:
            tokens, pace = number(row.get("tokens")), number(row.get("tokens_per_s"))
            if pace > 0 and tokens > before:
                total += (tokens - before) / pace
            if tokens > before:
                before = tokens
        return total


def number(value: Any, otherwise: float = math.nan) -> float:
    """Return what a row holds as a number; null, NaN and what is none become ``otherwise``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return otherwise
    return float(value)


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders and give each the shortest name that tells it from the others.

    Raises:
        UsageError: a folder has no metrics, or none yet, or is given twice.
    """
    paths = [Path(folder) for folder in folders]
    whole = [path.resolve() for path in paths]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            raise UsageError(f"run {paths[index]} is given twice; name each run once")
    return [load_run(path, name) for path, name in zip(paths, _names(whole), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def load_run(folder: Path, name: str) -> Run:
    """Read a run folder. Raises: as :func:`load_runs`."""
    try:
        rows = read_metrics(folder)
    except OSError as error:
        raise UsageError(f"{folder} has no {METRICS_FILE} ({error.strerror}); give the --run-dir of a run") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / METRICS_FILE} does not hold rows of metrics ({type(error).__name__}: {error});"
            " give the --run-dir of a run"
        ) from error
    if not rows:
        raise UsageError(f"{folder / METRICS_FILE} is empty; wait for the run's first log line")
    kinds: dict[str, list[Row]] = {"train": [], "eval": [], "test": [], "stability": []}
    for row in rows:
        kinds[kind_of(row)].append(row)
    notes: list[str] = []
    if not kinds["stability"]:
        notes.append("no stability indicators (--stability-interval 0, or a run of an earlier version)")
    if not any(math.isfinite(number(row["eval_loss"])) for row in kinds["eval"]):
        notes.append("no held-out loss")
    if not any(math.isfinite(number(row.get("loss"))) for row in kinds["train"]):
        notes.append("no finite training loss")
    settings = _settings(folder, notes)
    return Run(
        name=name,
        folder=folder,
        training=kinds["train"],
        evaluations=kinds["eval"],
        tests=kinds["test"],
        stability=kinds["stability"],
        events=_events(folder, notes),
        settings=settings,
        size=_size(settings, notes),
        profiles=_profiles(folder, notes),
        notes=notes,
    )


def _events(folder: Path, notes: list[str]) -> list[Row]:
    try:
        return [event for event in read_events(folder) if isinstance(event, dict)]
    except (OSError, ValueError) as error:
        notes.append(f"{EVENTS_FILE} cannot be read: {error}")
        return []


def _settings(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The resolved config, flat."""
    try:
        content = yaml_files.read(folder / CONFIG_FILE)
    except OSError as error:
        notes.append(f"no {CONFIG_FILE} ({error.strerror}): size, FLOPs and settings are left out")
        return None
    except ValueError as error:
        notes.append(f"{CONFIG_FILE} is not YAML ({error}): size, FLOPs and settings left out")
        return None
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        notes.append(f"{CONFIG_FILE} has no sections of settings: size, FLOPs and settings are left out")
        return None
    return {f"{name}.{key}": value for name, section in content.items() for key, value in section.items()}


def _size(settings: dict[str, Any] | None, notes: list[str]) -> Size | None:
    """What the resolved sizes amount to; settings that this version does not know are passed over."""
    if settings is None:
        return None
    known: dict[str, dict[str, Any]] = {}
    for section in ("model", "moe"):
        fields = typing.get_type_hints(arguments.section_types()[section])
        given = {key: settings[f"{section}.{key}"] for key in fields if f"{section}.{key}" in settings}
        known[section] = given
    try:
        config: Config = arguments.from_dict(known, source=CONFIG_FILE)
    except UsageError as error:
        notes.append(f"size and FLOPs are left out: {error}")
        return None
    model, moe = config.model, config.moe
    if not (model.num_layers and model.hidden_size and model.vocab_size):
        notes.append(f"{CONFIG_FILE} lacks resolved sizes: parameters and FLOPs are left out")
        return None
    return Size(
        layers=model.num_layers,
        width=model.hidden_size,
        parameters=estimate.parameter_count(model, moe),
        active=estimate.parameter_count(model, moe, active=True),
        flops_per_token=estimate.train_flops_per_token(model, moe),
    )


def _profiles(folder: Path, notes: list[str]) -> dict[str, list[Row]]:
    profiles = {}
    for path in sorted((folder / PROFILE_FOLDER).glob("rank*.json")):
        if path.name.endswith(".trace.json"):
            continue
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            notes.append(f"{PROFILE_FOLDER}/{path.name} cannot be read: {error}")
            continue
        if isinstance(content, list):
            profiles[path.stem] = [row for row in content if isinstance(row, dict)]
    return profiles


def summarize(run: Run) -> str:
    """Return one line on what a run achieved."""
    evaluations = [value for value in (number(row["eval_loss"]) for row in run.evaluations) if math.isfinite(value)]
    training = [row for row in run.training if math.isfinite(number(row.get("loss")))]
    parts = []
    if evaluations:
        share = 100 * evaluations[-1] / evaluations[0] if evaluations[0] else math.nan
        parts.append(f"held-out loss {evaluations[0]:.3f} -> {evaluations[-1]:.3f} ({share:.0f}% of its first value)")
    if training:
        last = training[-1]
        parts.append(f"{run.tokens:,.0f} tokens in {last['iteration']} iterations, training loss {last['loss']:.3f}")
    if drifts := run.values("radius_drift"):
        parts.append(f"radius drift at most {max(drifts):.1e}")
    return "; ".join(parts) or "no finite loss yet"
