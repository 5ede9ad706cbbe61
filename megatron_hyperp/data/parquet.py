"""Reading one column of a Parquet file with pyarrow, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_hyperp.data.streams import Stream
from megatron_hyperp.errors import UsageError

_ROWS = 256
_COLUMNS_SHOWN = 20


def open_column(stream: Stream, key: str) -> Any:
    """Open a Parquet file and check that it has a column of text.

    Returns:
        A ``pyarrow.parquet.ParquetFile``.

    Raises:
        UsageError: when pyarrow is not installed, the input is compressed or a pipe, it is no whole Parquet file, or
            it has no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("Parquet needs the package pyarrow; pip install 'megatron-hyperp[data]'") from error
    file = stream.seekable_file()
    if file is None:
        raise UsageError(f"{stream.name} is Parquet in a pipe or compressed as a whole; give the file itself")
    try:
        opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
        schema = opened.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(stream, error) from error
    if schema.names.count(key) != 1:
        names = ", ".join(schema.names[:_COLUMNS_SHOWN])
        raise UsageError(f"{stream.name} has no column {key!r} (its columns: {names}); name one with --json-key")
    kind = schema.field(key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary")
    if not any(getattr(pyarrow.types, test)(kind) for test in tests if hasattr(pyarrow.types, test)):
        raise UsageError(f"{stream.name} has no text in column {key!r}, but {kind}; name another with --json-key")
    return opened


def read_column(stream: Stream, key: str) -> Iterator[bytes | None]:
    """Yield the values of a column: UTF-8, or None for null; ``stream.consumed`` grows with the rows.

    Raises:
        UsageError: as :func:`open_column`, and for damaged data.
    """
    opened = open_column(stream, key)
    import pyarrow

    row, rows, size = 0, opened.metadata.num_rows, stream.size
    try:
        for batch in opened.iter_batches(_ROWS, columns=[key], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                row += 1
                stream.consumed = size * row // rows
                yield value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(stream, error) from error
    if row != rows:
        raise UsageError(f"{stream.name} is damaged: it holds {row:,} of {rows:,} rows; copy or download it again")


def _damaged(stream: Stream, error: Exception) -> UsageError:
    return UsageError(f"{stream.name} cannot be read as Parquet ({error}); copy or download it again")
