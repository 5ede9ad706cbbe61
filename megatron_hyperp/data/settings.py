"""How the documents of a corpus were tokenized, in ``PREFIX.settings.json`` next to its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import read_json, write_atomically


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What was chosen when a corpus was made.

    Attributes:
        prepend_bos: whether each document begins with the beginning-of-sequence token.
    """

    prepend_bos: bool = False


def settings_file(bin_path: Path) -> Path:
    """Return where the settings of a corpus are."""
    return bin_path.with_name(f"{bin_path.name.removesuffix('.bin')}.settings.json")


def write(bin_path: Path, settings: CorpusSettings) -> None:
    """Write the settings next to the ``.bin`` of a corpus.

    Raises:
        UsageError: they cannot be written.
    """
    write_atomically(settings_file(bin_path), json.dumps(dataclasses.asdict(settings)) + "\n")


def read(prefix: str) -> CorpusSettings | None:
    """Return the settings of a corpus; None if it has none, as those of Megatron-LM's tools and of older versions.

    Raises:
        UsageError: they are damaged.
    """
    path = settings_file(Path(f"{prefix}.bin"))
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); preprocess the corpus again") from error
    found = content.get("prepend_bos") if isinstance(content, dict) else None
    if not isinstance(found, bool):
        raise UsageError(f"{path} has no prepend_bos that is true or false; preprocess the corpus again")
    return CorpusSettings(found)


def blend_prepends_bos(prefixes: Sequence[str], *, asked: bool) -> bool:
    """Return whether the documents of all corpora begin with the beginning-of-sequence token.

    Args:
        prefixes: of the corpora.
        asked: the run's ``--prepend-bos``, which says so of corpora without settings.

    Raises:
        UsageError: some do and others do not, or the flag contradicts the settings; a corpus of either kind is named.
    """
    found = {prefix: read(prefix) for prefix in prefixes}
    choices = {prefix: asked if settings is None else settings.prepend_bos for prefix, settings in found.items()}
    having = [prefix for prefix, prepends in choices.items() if prepends]
    lacking = [prefix for prefix, prepends in choices.items() if not prepends]
    if asked and lacking:
        raise UsageError(
            f"--prepend-bos: the documents of {lacking[0]} were preprocessed without --prepend-bos; preprocess them"
            " with it, or leave it out here",
            same_on_all_ranks=True,
        )
    if having and lacking:
        raise UsageError(
            f"documents of {having[0]} begin with the beginning-of-sequence token, those of {lacking[0]} do not;"
            " preprocess one of them again with the other's choice of --prepend-bos",
            same_on_all_ranks=True,
        )
    return bool(having)
