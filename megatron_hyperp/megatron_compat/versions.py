"""Versions of Megatron-Core: the installed one, those that are supported, and what each of them needs."""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_hyperp.errors import UsageError

# As in setup.py. Tested: the whole suite on the first, `make test` on the last, `make test-versions` on the others.
SUPPORTED = SpecifierSet(">=0.16.1,<0.20")
TESTED = tuple(map(Version, ("0.16.1", "0.17.1", "0.18.2", "0.19.2")))
OLDEST = TESTED[0]
# The first release line that is not supported yet.
NEXT_LINE = Version("0.20.dev0")
# The first version that needs Python 3.12, and that imports nvidia-resiliency-ext, which has to be new enough.
NEEDS_PYTHON_312 = Version("0.17")
NEEDS_RESILIENCY_EXT = (Version("0.17"), Version("0.6"))


def installed(package: str) -> Version | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _megatron_core_version() -> Version:
    found = installed("megatron-core")
    if found is None:
        raise UsageError(f"megatron-core is not installed; pip install 'megatron-core{SUPPORTED}'")
    return found


megatron_core_version = _megatron_core_version()


def check(
    version: Version = megatron_core_version,
    *,
    python: tuple[int, int] = sys.version_info[:2],
    resiliency_ext: Version | None = None,
) -> str | None:
    """See that a version of Megatron-Core is one that this trainer can use.

    Args:
        version: of Megatron-Core.
        python: version of the interpreter.
        resiliency_ext: version of nvidia-resiliency-ext; None if it is not installed.

    Returns:
        A warning in one line if the version is newer than all that were tested; else None.

    Raises:
        UsageError: the version is too old, needs a newer Python, or cannot be imported with this nvidia-resiliency-ext.
    """
    tested = ", ".join(map(str, TESTED))
    if version < OLDEST:
        raise UsageError(
            f"megatron-core {version} is installed; supported are versions {SUPPORTED} (tested: {tested}):"
            f" pip install 'megatron-core{SUPPORTED}'",
            same_on_all_ranks=True,
        )
    if version >= NEEDS_PYTHON_312 and python < (3, 12):
        raise UsageError(
            f"megatron-core {version} needs Python 3.12 or newer, and this is Python {python[0]}.{python[1]}; use"
            f" another Python, or pip install 'megatron-core>={OLDEST},<{NEEDS_PYTHON_312}'",
            same_on_all_ranks=True,
        )
    since, needed = NEEDS_RESILIENCY_EXT
    if resiliency_ext is not None and version >= since and resiliency_ext < needed:
        raise UsageError(
            f"megatron-core {version} cannot be imported with nvidia-resiliency-ext {resiliency_ext}; it needs {needed}"
            f" or newer: pip install 'nvidia-resiliency-ext>={needed}' (its wheels need glibc 2.39), or uninstall it",
            same_on_all_ranks=True,
        )
    if version >= NEXT_LINE:
        return f"megatron-core {version} is newer than all tested versions ({tested}; supported: {SUPPORTED})"
    return None


def check_installed() -> str | None:
    """Do what :func:`check` does for what is installed here."""
    return check(resiliency_ext=installed("nvidia-resiliency-ext"))
