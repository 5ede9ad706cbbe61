"""From YAML files and Megatron-style flags to a :class:`~megatron_hyperp.config.Config`, and back to YAML."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_hyperp import yaml_files
from megatron_hyperp.config import RANGES, Config, flag_name
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import not_local


def section_types() -> dict[str, type]:
    """Name of each YAML section and its dataclass."""
    return typing.get_type_hints(Config)


def load_yaml(*paths: str | Path) -> Config:
    """Read config files; what a later one sets beats an earlier one.

    Raises:
        UsageError: no such file, no YAML, an unknown section or key (the nearest known one is named), a wrong type, or
            a key that an earlier file leaves without effect.
    """
    config = Config()
    for index, path in enumerate(paths):
        given = _settings(_read_yaml(path), source=str(path))
        values = {name: value for section in given.values() for name, value in section.items()}
        earlier = ", ".join(str(other) for other in paths[:index])
        _check_derivation(config, values, earlier, file=str(path))
        _set(config, given)
    return config


def load_stored(path: str | Path) -> Config:
    """Read the config of a checkpoint or run. Raises: as :func:`load_yaml`.

    Earlier versions wrote 0 for a number that was not set; where 0 is not a valid value, it is read as None. They also
    wrote Newton-Schulz steps that were not asked for.
    """
    config = load_yaml(path)
    config.optimizer.ns_steps = config.optimizer.steps.text(config.optimizer.ns_coefficients)
    for section in (getattr(config, item.name) for item in dataclasses.fields(config)):
        for item in dataclasses.fields(section):
            if item.default is None and getattr(section, item.name) == 0 and not RANGES[item.metadata["allowed"]](0):
                setattr(section, item.name, None)
    return config


def _read_yaml(path: str | Path) -> Any:
    try:
        return yaml_files.read(Path(path))
    except OSError as error:
        fault = not_local(str(path)) or f"{path} cannot be read: {error.strerror}; check the path"
        raise UsageError(f"config {fault}", same_on_all_ranks=True) from error
    except ValueError as error:
        message = f"config {path} is not YAML: {error}"
        raise UsageError(message, same_on_all_ranks=True) from error


def from_dict(content: Any, *, source: str) -> Config:
    """Build a config from nested mappings; ``source`` names them in errors. Raises: as :func:`load_yaml`."""
    config = Config()
    _set(config, _settings(content, source))
    return config


def _settings(content: Any, source: str) -> dict[str, dict[str, Any]]:
    """Return what nested mappings set, by section, converted to the fields' types."""
    sections = section_types()
    given: dict[str, dict[str, Any]] = {}
    for section_name, values in _mapping(content, source).items():
        if section_name not in sections:
            raise _unknown(section_name, sections, f"{source}: section {section_name}")
        hints = typing.get_type_hints(sections[section_name])
        given[section_name] = {}
        for key, value in _mapping(values, f"{source}: section {section_name}").items():
            if key not in hints:
                raise _unknown(key, hints, f"{source}: key {section_name}.{key}")
            given[section_name][key] = convert(value, hints[key], f"{source}: {section_name}.{key}")
    return given


def _set(config: Config, given: dict[str, dict[str, Any]]) -> None:
    for section_name, values in given.items():
        for key, value in values.items():
            setattr(getattr(config, section_name), key, value)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds {shown(value)}; it must map names to values", same_on_all_ranks=True)
    return value


def _unknown(name: Any, known: Iterable[str], where: str) -> UsageError:
    """Say what was meant: a key of another section, one spelled nearly so, or any of the known ones."""
    homes = [section for section, kind in section_types().items() if name in typing.get_type_hints(kind)]
    near = difflib.get_close_matches(str(name)[:_LONGEST_SHOWN], known, n=1)
    if homes:
        hint = f"it belongs to section {homes[0]}"
    elif near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"known are {', '.join(known)}"
    return UsageError(f"{where} is unknown; {hint}", same_on_all_ranks=True)


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML value or a flag's string to a field's type.

    The word ``none`` unsets a number that may be unset, as ``null`` does in YAML.

    Raises:
        UsageError: the value is not of that type.
    """
    kind, optional, choices = _unwrap(hint)
    if optional and (value is None or (value == "none" and kind in (int, float))):
        return None
    if choices:
        if value not in choices:
            raise UsageError(f"{where} is {shown(value)}; allowed are {', '.join(choices)}", same_on_all_ranks=True)
        return value
    with contextlib.suppress(ValueError, OverflowError):
        if kind is bool and isinstance(value, bool):
            return value
        if kind is list and isinstance(value, list) and all(map(_is_scalar, value)):
            return [str(item) for item in value]
        if kind is list and isinstance(value, str) and _is_scalar(value):
            return value.split()
        if kind is str and _is_scalar(value):
            return str(value)
        # YAML 1.1 reads 1e-3 as a string, and 10 where a float is meant as an int.
        if kind is float and _is_scalar(value):
            return float(value)
        if kind is int and _is_scalar(value) and float(value) == int(float(value)):
            # Large integers do not pass through float, which would round them.
            number = int(value) if str(value).lstrip("+-").isdigit() else int(float(value))
            if abs(number) <= _LARGEST_INTEGER:
                return number
    raise UsageError(f"{where} is {shown(value)}; it must be {_TYPE_NAMES[kind]}", same_on_all_ranks=True)


def shown(value: Any) -> str:
    """A value as errors quote it: cut short, whatever a file has for it."""
    return _SHORT.repr(value)


_LONGEST_SHOWN = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST_SHOWN
_SHORT.maxlist = _SHORT.maxdict = 20
_SHORT.maxlevel = 3
# Of 64 bits; products of four are still floats.
_LARGEST_INTEGER = 2**63 - 1


def _is_scalar(value: Any) -> bool:
    """Whether a value is a number, or a string that can be a path and be written: no NUL, no half of a surrogate."""
    if isinstance(value, str):
        return "\0" not in value and value == value.encode(errors="ignore").decode()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPE_NAMES = {
    int: "an integer below 2^63",
    float: "a number",
    str: "a string (UTF-8, without NUL)",
    bool: "true or false",
    list: "a list of strings (UTF-8, without NUL)",
}


def _unwrap(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Split a field's type hint into the bare type, whether None is allowed, and the literal choices."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = type(None) in typing.get_args(hint)
        (hint,) = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return str, optional, typing.get_args(hint)
    return typing.get_origin(hint) or hint, optional, ()


DERIVED_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
)
# Flags from which others follow, with their section and those that follow.
DERIVATIONS = {
    "depth": ("model", DERIVED_SIZES),
    "aspect_ratio": ("model", DERIVED_SIZES),
    "moe_sparsity": ("moe", ("num_experts",)),
    "moe_topk": ("moe", ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")),
    "moe_shared_expert": ("moe", ("num_experts", "moe_router_topk", "moe_shared_expert_intermediate_size")),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized"):
            near = [match for word in message.split() for match in difflib.get_close_matches(word, known, 1, 0.75)]
            message += f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{message} (--help lists the flags)", same_on_all_ranks=True)


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--config FILE`` and one flag for every field, grouped by section."""
    parser = _Parser(description=description, epilog="--debug shows the traceback of an error.", allow_abbrev=False)
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files with the same knobs; a later file beats an earlier one, and a flag beats them all",
    )
    for section_name, kind in section_types().items():
        summary = (kind.__doc__ or "").split("\n")[0].replace("``", "")
        group = parser.add_argument_group(section_name, summary)
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            _add_flag(group, item, hints[item.name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, item: dataclasses.Field[Any], hint: Any) -> None:
    kind, _, choices = _unwrap(hint)
    default = item.default if item.default_factory is dataclasses.MISSING else None
    text = item.metadata["help"] + ("" if "[" in item.metadata["help"] or default is None else f" [{default}]")
    text = text.replace("%", "%%")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": item.name, "help": text}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is list:
        options.update(nargs="+", metavar="WORD")
    else:
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
    group.add_argument(flag_name(item.name), **options)


def parse(argv: list[str], *, description: str) -> Config:
    """Read ``--config`` and flags into a config, not yet resolved.

    Raises:
        UsageError: an unknown flag, a value of the wrong type, or a flag that the file leaves without effect.
    """
    return from_flags(vars(build_parser(description).parse_args(argv)))


def from_flags(given: dict[str, Any]) -> Config:
    """Build a config from what :func:`build_parser`'s parser found, by destination; other entries are passed over.

    Raises: as :func:`parse`.
    """
    paths = given["config"]
    config = load_yaml(*paths)
    _check_derivation(config, given, ", ".join(paths))
    for section_name, kind in section_types().items():
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if item.name in given:
                value = convert(given[item.name], hints[item.name], flag_name(item.name))
                setattr(getattr(config, section_name), item.name, value)
    return config


def _check_derivation(config: Config, given: dict[str, Any], source: str, *, file: str | None = None) -> None:
    """Refuse a knob of :data:`DERIVATIONS` beside files that fix what would follow from it.

    Args:
        config: read from the files so far.
        given: what is to be set beside them.
        source: the files' names.
        file: where it is given; None for flags.
    """
    for name, (section, followers) in DERIVATIONS.items():
        fixed = [
            other for other in followers if getattr(getattr(config, section), other) is not None and other not in given
        ]
        if given.get(name) is not None and fixed:
            raise UsageError(
                f"{_spelled(name, given[name], file)} changes nothing in {source}, which sets {', '.join(fixed)};"
                " take those out of the file (a run's config.yaml has them all: start from the file you gave it)",
                same_on_all_ranks=True,
            )


def _spelled(name: str, value: Any, file: str | None) -> str:
    """A knob and its value as the user wrote them."""
    if file:
        return f"{file}: {name} {value}"
    if isinstance(value, bool):
        return flag_name(name) if value else flag_name(f"no_{name}")
    return f"{flag_name(name)} {value}"


def to_yaml(config: Config) -> str:
    """Write a config as YAML that :func:`load_yaml` reads back."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)
