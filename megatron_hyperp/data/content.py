"""Is a corpus what was written? Checksums of its files, in ``PREFIX.checksums.json`` beside them."""

from __future__ import annotations

import os

from megatron_hyperp import checksums
from megatron_hyperp.data.indexed import check_prefix, checksums_file, prefix_files
from megatron_hyperp.errors import UsageError


def record(prefix: str | os.PathLike[str]) -> None:
    """Take and write the checksums of a corpus.

    Raises:
        UsageError: as :func:`check_prefix`.
    """
    check_prefix(prefix)
    files = prefix_files(prefix)
    place = checksums_file(files[0])
    checksums.write(place.parent, {path.name: checksums.checksum(path) for path in files}, place.name)


def check_content(prefix: str | os.PathLike[str], *, most_bytes: int | None = None) -> bool:
    """Compare a corpus with its checksums.

    Args:
        prefix: of its files.
        most_bytes: of a larger file only the size is compared; None: all are read.

    Returns:
        Whether there are checksums of all of it to compare with; Megatron-LM's tools write none.

    Raises:
        UsageError: a file is not what was written.
    """
    files = prefix_files(prefix)
    place = checksums_file(files[0])
    remedy = f"python tools/check_data.py --record {prefix}"
    try:
        sums = checksums.read(place.parent, place.name) or {}
    except ValueError as error:
        raise UsageError(f"{place}: {error}; {remedy} mends it") from error
    for path in files:
        if path.name in sums:
            whole = most_bytes is None or sums[path.name].size <= most_bytes
            if fault := checksums.fault(path.parent, path.name, sums[path.name], content=whole):
                raise UsageError(
                    f"{path.parent / fault}, as {place.name} has it; preprocess the corpus again, or, where it was"
                    f" changed on purpose, {remedy}"
                )
    return all(path.name in sums for path in files)
