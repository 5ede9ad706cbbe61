"""Update rules, one file each, registered by name; a user's own come from a file of theirs.

A rule is an :class:`~megatron_hyperp.optim.rules.base.UpdateRule`. ``register`` makes a class known by its name;
``rule_class`` finds one by name or as ``FILE.py:CLASS``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.rules.adam import AdamHRule, AdamWRule
from megatron_hyperp.optim.rules.base import Part, StateEntry, UpdateRule
from megatron_hyperp.optim.rules.muon import MuonHRule, MuonRule
from megatron_hyperp.optim.rules.normuon import NorMuonHRule, NorMuonRule

__all__ = ["REGISTERED", "Part", "StateEntry", "UpdateRule", "register", "rule_class"]

REGISTERED: dict[str, type[UpdateRule]] = {}
_Rule = TypeVar("_Rule", bound=type[UpdateRule])


def register(rule: _Rule) -> _Rule:
    """Make a rule known by its ``name``; a decorator.

    Raises:
        ValueError: no name, or one that another class has.
    """
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{rule.__name__} has no name; set the class attribute 'name'")
    known = REGISTERED.setdefault(name, rule)
    if known is not rule:
        raise ValueError(f"the name {name!r} of {rule.__name__} is that of {known.__name__}; choose another")
    return rule


for _rule in (MuonHRule, MuonRule, AdamHRule, AdamWRule, NorMuonRule, NorMuonHRule):
    register(_rule)

# Classes from files, by absolute path and name: a file is executed once.
_LOADED: dict[tuple[Path, str], type[UpdateRule]] = {}


def rule_class(rule: str | type[UpdateRule]) -> type[UpdateRule]:
    """Return the class of a rule.

    Args:
        rule: a registered name, ``FILE.py:CLASS`` (the file is executed), or the class itself.

    Raises:
        UsageError: an unknown name, a file or class that is not there, or a class that is no rule.
    """
    if isinstance(rule, type):
        if not issubclass(rule, UpdateRule):
            raise UsageError(f"the optimizer rule {rule.__name__} is not a subclass of UpdateRule; derive it from that")
        return rule
    if rule in REGISTERED:
        return REGISTERED[rule]
    if ":" not in rule:
        raise UsageError(
            f"the optimizer rule {rule!r} is unknown; give one of {', '.join(sorted(REGISTERED))}, or FILE.py:CLASS"
        )
    file, _, name = rule.rpartition(":")
    key = (Path(file).resolve(), name)
    if key not in _LOADED:
        _LOADED[key] = _load(*key, rule)
    return _LOADED[key]


def _load(path: Path, name: str, given: str) -> type[UpdateRule]:
    spec = importlib.util.spec_from_file_location(f"megatron_hyperp_rule_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"the optimizer rule {given!r} names no Python file; give FILE.py:CLASS")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"the optimizer rule {given!r}: {path.name} raised {type(error).__name__} ({error}); fix the file"
        ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, UpdateRule):
        raise UsageError(f"the optimizer rule {given!r}: {path.name} has no class {name} derived from UpdateRule")
    if not isinstance(getattr(found, "name", None), str):
        raise UsageError(f"the optimizer rule {given!r}: {name} has no name; set the class attribute 'name'")
    return found
