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
        Whether there are checksums to compare with; Megatron-LM's tools write none.

    Raises:
        UsageError: a file is not what was written.
    """
    files = prefix_files(prefix)
    place = checksums_file(files[0])
    folder, name = place.parent, place.name
    try:
        sums = checksums.read(folder, name)
        for path in files if sums is not None else ():
            small = most_bytes is None or path.stat().st_size <= most_bytes
            expected = (sums or {}).get(path.name)
            fault = checksums.fault(folder, path.name, expected, content=small) if expected else None
            if fault:
                raise UsageError(
                    f"{folder / fault}, as {name} has it; preprocess the corpus again, or, where it was changed on"
                    f" purpose, python tools/check_data.py --record {prefix}"
                )
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder / name}: {error}; python tools/check_data.py --record {prefix} mends it") from error
    return sums is not None
