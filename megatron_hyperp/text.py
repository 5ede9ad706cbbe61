"""Plain tables for terminals and logs, and numbers in messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Callable[[int], bool] = lambda column: False) -> list[str]:
    """Return the lines of a table, its columns two spaces apart.

    Args:
        rows: of cells, all of one length.
        right: whether a column is flush right.
    """
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if right(index) else cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def multiples(number: int, divisor: int) -> str:
    """The multiples of ``divisor`` on both sides of a number that is none."""
    below = number // divisor * divisor
    return " and ".join(str(multiple) for multiple in (below, below + divisor) if multiple)


def divisors(number: int) -> str:
    """All divisors of a number; of a huge one, which nobody means, those up to a million."""
    most = 10**6
    found = [str(divisor) for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
    return ", ".join([*found, "..."] if number > most else found)
