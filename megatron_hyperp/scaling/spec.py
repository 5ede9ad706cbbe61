"""What a sweep measures: a YAML file of fixed settings and axes, and the trainings that they make.

::

    config: examples/configs/quickstart.yaml    # what examples/pretrain_gpt.py takes as --config
    set: {data_path: runs/data/python, tokenizer_model: runs/data/tokenizer.model}
    axes:                                       # every combination is trained
      num_layers: [2, 4, 8]
      train_tokens: 2.5e5/4e6/4                 # from/to/factor
      eta0: {start: 0.06}                       # a search: see Search
    blocks:                                     # optional: one grid after the other, each with axes of its own
      - method: hyperp                          # label in the table [the optimizer]
      - method: held
        set: {embedding_lr: 0.06}

Names are those of the config's fields. Beside them, ``embedding_lr`` and ``adam_lr`` hold a learning rate fixed where
``embedding_lr_mult`` and ``adam_lr_mult`` tie it to the peak learning rate. Paths are relative to the working folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperp import arguments, yaml_files
from megatron_hyperp.config import Config
from megatron_hyperp.data.indexed import check_prefix
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.learning_rates import lr_multipliers
from megatron_hyperp.scaling.axes import FIELDS, HELD, HELD_ROLES, Search, is_number, meant, parse_axis
from megatron_hyperp.scaling.point import Point

# What a sweep decides itself, or what its runs would overwrite for each other.
NOT_SWEPT = ("run_dir", "save", "load", "exit_interval", "tensorboard_dir", "wandb_exp_name")
Settings = dict[str, Any]


@dataclass(slots=True)
class Series:
    """Trainings that differ in the searched value alone; a single one where nothing is searched."""

    method: str | None
    settings: Settings
    search: Search | None
    spec: Spec
    _points: dict[int, Point] = dataclasses.field(default_factory=dict)

    def point(self, power: int) -> Point:
        """The training of a power of the search; without one, of power 0."""
        if power not in self._points:
            searched = {self.search.name: self.search.value(power)} if self.search else {}
            self._points[power] = self.spec.point(self.method, self.settings | searched)
        return self._points[power]

    def powers(self, losses: Mapping[int, float]) -> list[int]:
        """As :meth:`Search.powers`."""
        return self.search.powers(losses) if self.search else [0]


class Spec:
    """A sweep that has been read and checked.

    Args:
        content: of the YAML file.
        source: how errors name it.

    Attributes:
        series: in the order of the file.
        columns: what the table tells beside the contract's columns.
        ranks: of each training.
        slurm: ``#SBATCH`` options.

    Raises:
        UsageError: a key, name or value that is none; a training that the trainer would refuse; an axis without effect.
    """

    def __init__(self, content: Any, *, source: str) -> None:
        self.source = source
        known = ("config", "ranks", "set", "axes", "blocks", "slurm")
        content = self._mapping(content, known, source)
        self.ranks = arguments.convert(content.get("ranks", 1), int, f"{source}: ranks")
        if self.ranks < 1:
            raise UsageError(f"{source}: ranks is {self.ranks}; give 1 or more")
        self.slurm: dict[str, Any] = self._mapping(content.get("slurm"), None, f"{source}: slurm")
        self._vocabularies: dict[str, int] = {}
        self._base, self._held = self._read_base(content)
        self.series: list[Series] = []
        self.columns: list[str] = []
        blocks = content.get("blocks", [{}])
        if not isinstance(blocks, list) or not blocks:
            raise UsageError(f"{source}: blocks holds {blocks!r}; give a list of blocks, or leave it out")
        for number, block in enumerate(blocks, start=1):
            where = f"{source}: block {number}"
            self._add_block(self._mapping(block, ("method", "set", "axes"), where), content.get("axes"), where)
        self._check_series()

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read a file. Raises: as the class, and UsageError where it cannot be read."""
        try:
            content = yaml_files.read(Path(path))
        except OSError as error:
            raise UsageError(f"sweep {path} cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise UsageError(f"sweep {path} is not YAML: {error}") from error
        return cls(content, source=str(path))

    def _mapping(self, value: Any, known: Iterable[str] | None, where: str) -> dict[str, Any]:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise UsageError(f"{where} holds {value!r}; it must map names to values")
        for key in value:
            if known is not None and key not in known:
                raise UsageError(f"{where}: key {key} is unknown; {meant(str(key), list(known))}")
        return {str(key): item for key, item in value.items()}

    def _read_base(self, content: dict[str, Any]) -> tuple[Config, Settings]:
        """Return the config that all trainings share, and the learning rates that all of them hold fixed."""
        path, where = content.get("config"), f"{self.source}: set"
        base = arguments.load_yaml(str(path)) if path else Config()
        fixed = self._checked(self._mapping(content.get("set"), None, where), where)
        held = {name: fixed.pop(name) for name in HELD if name in fixed}
        base = apply(base, fixed, where)
        for name in ("save", "load", "exit_interval", "tensorboard_dir"):
            if getattr(getattr(base, FIELDS[name][0]), name):
                raise UsageError(f"{path} sets {name}, which the runs of a sweep do without; take it out")
        return base, held

    def _checked(self, settings: Settings, where: str) -> Settings:
        for name in settings:
            if name in NOT_SWEPT:
                raise UsageError(f"{where}: {name} is not for a sweep, whose runs have folders of their own")
            if name not in FIELDS and name not in HELD:
                raise UsageError(f"{where}: {name} is no field of a config; {meant(name, [*FIELDS, *HELD])}")
        return settings

    def _add_block(self, block: dict[str, Any], common: Any, where: str) -> None:
        fixed = self._held | self._checked(self._mapping(block.get("set"), None, f"{where}: set"), f"{where}: set")
        shared = self._mapping(common, None, f"{self.source}: axes")
        # What a block fixes or varies itself replaces the axis that all blocks share.
        axes = {name: axis for name, axis in shared.items() if name not in fixed}
        axes |= self._mapping(block.get("axes"), None, f"{where}: axes")
        for name in self._checked(axes, f"{where}: axes"):
            if name in fixed:
                raise UsageError(f"{where} both sets {name} and has an axis of it; leave one out")
        parsed = {name: parse_axis(name, axis, f"{where}: axis {name}") for name, axis in axes.items()}
        searches = [axis for axis in parsed.values() if isinstance(axis, Search)]
        if len(searches) > 1:
            names = ", ".join(search.name for search in searches)
            raise UsageError(f"{where} searches {names} at once; give lists for all but one of them")
        grids = {name: axis for name, axis in parsed.items() if not isinstance(axis, Search)}
        self.columns += [name for name in (*fixed, *axes) if name not in self.columns]
        method = block.get("method")
        for values in itertools.product(*grids.values()):
            settings = {**fixed, **dict(zip(grids, values, strict=True))}
            search = searches[0] if searches else None
            self.series.append(Series(None if method is None else str(method), settings, search, self))
        self._check_block(self.series[-math.prod(map(len, grids.values())) :], where)

    def _check_block(self, block: Sequence[Series], where: str) -> None:
        """Resolve every point as the trainer will; refuse two that are the same."""
        seen: dict[str, str] = {}
        for series in block:
            for power in series.powers({}):
                point = series.point(power)
                told = ", ".join(f"{name} {value}" for name, value in point.settings.items())
                if point.key in seen:
                    raise UsageError(
                        f"{where}: ({seen[point.key]}) and ({told}) are the same training; an axis has no effect beside"
                        " what the config or another setting fixes, or names a value twice"
                    )
                seen[point.key] = told

    def _check_series(self) -> None:
        """Look at what all trainings share: text that is there, and an evaluation at the end."""
        prefixes: set[str] = set()
        for series in self.series:
            config = series.point(0).resolved
            if not (config.training.eval_interval and config.training.eval_iters):
                raise UsageError(f"{self.source}: a sweep compares held-out losses; set eval_interval and eval_iters")
            if not config.data.data_path:
                raise UsageError(f"{self.source}: no data; set data_path (tools/preprocess_data.py makes one)")
            prefixes.update(word for word in config.data.data_path if not is_number(word))
        for prefix in sorted(prefixes):
            check_prefix(prefix)

    def point(self, method: str | None, settings: Settings) -> Point:
        """Build and resolve the config of one training. Raises: UsageError, as the trainer would."""
        where = f"{self.source}: " + ", ".join(f"{name} {value}" for name, value in settings.items())
        held = {HELD[name]: item for name, item in settings.items() if name in HELD}
        free = {name: item for name, item in settings.items() if name not in HELD}
        config = apply(self._base, {**free, **dict.fromkeys(held, 1.0)}, where)
        try:
            resolved = self._resolve(config)
            rates = {name: arguments.convert(rate, float, where) for name, rate in held.items()}
            for name, factor in _holding(resolved, rates).items():
                setattr(config.optimizer, name, factor)
            resolved = self._resolve(config) if held else resolved
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        return Point(method or resolved.optimizer.optimizer, settings, config, resolved)

    def _resolve(self, config: Config) -> Config:
        path = config.data.tokenizer_model
        if not path:
            raise UsageError("no tokenizer; set the tokenizer_model that the data were made with")
        if path not in self._vocabularies:
            self._vocabularies[path] = load_tokenizer(path).vocab_size
        return config.resolve(world_size=self.ranks, tokenizer_vocab_size=self._vocabularies[path])


def _holding(resolved: Config, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the factors that hold learning rates fixed, by field.

    Args:
        resolved: with factors of 1 in these fields.
        rates: by field.

    Raises:
        UsageError: the factor is of two roles whose laws differ.
    """
    peak, multipliers = resolved.learning_rate().value, lr_multipliers(resolved)
    follows = resolved.optimizer.output_lr_mult is None and resolved.model.untie_embeddings_and_output_weights
    if "adam_lr_mult" in rates and follows and multipliers["output"] != multipliers["vector"]:
        raise UsageError(
            "adam_lr cannot hold both gains and output layer, whose learning rates are"
            f" {multipliers['vector']:.4g} and {multipliers['output']:.4g} times the peak; set output_lr_mult"
        )
    return {name: rate / (peak * multipliers[HELD_ROLES[name]]) for name, rate in rates.items()}


def apply(config: Config, settings: Settings, where: str) -> Config:
    """Return a copy of a config with some fields set, whatever their sections."""
    result = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section)) for section in arguments.section_types()}
    )
    for name, value in settings.items():
        section, hint = FIELDS[name]
        setattr(getattr(result, section), name, arguments.convert(value, hint, f"{where}: {name}"))
    return result
