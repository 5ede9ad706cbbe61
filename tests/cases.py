"""Results that tests share, each computed when a test first asks for it."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch


class Cases:
    """Results by name. Each is computed once per session, whichever process of pytest asks first, and kept on disk.

    A failure is kept as well: the tests that need the result fail with its message.

    Args:
        folder: that all processes of the session share.
        compute: returns the result of a name: plain values or tensors. It gets the name and an empty folder.
    """

    def __init__(self, folder: Path, compute: Callable[[Any, Path], Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._compute = folder, compute
        self._found: dict[Any, Any] = {}

    def folder(self, name: Any) -> Path:
        """The folder that the computation of ``name`` gets."""
        return self._folder / hashlib.sha256(repr(name).encode()).hexdigest()[:12]

    def __getitem__(self, name: Any) -> Any:
        if name not in self._found:
            self._found[name] = self._get(name)
        return self._found[name]

    def _get(self, name: Any) -> Any:
        folder = self.folder(name)
        result, failure = folder.with_suffix(".result"), folder.with_suffix(".failure")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert not failure.exists(), failure.read_text()
            if not result.exists():
                folder.mkdir()
                try:
                    torch.save(self._compute(name, folder), result)
                except BaseException as error:
                    result.unlink(missing_ok=True)
                    failure.write_text(f"{name}: {error}")
                    raise
            return torch.load(result, weights_only=False)


def kept(parameters: Iterable[Any], names: Collection[str]) -> list[Any]:
    """Return parameters of which ``make test`` takes ``names`` alone, and ``make test-all`` all.

    Args:
        parameters: names, or tuples of which the first element or the whole is a name.
        names: of those that `make test` takes.
    """
    given = [value if isinstance(value, tuple) else (value,) for value in parameters]
    return [pytest.param(*v, marks=() if v[0] in names or v in names else pytest.mark.matrix) for v in given]
