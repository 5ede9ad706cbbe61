"""Methods that are compared take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence


def in_turns(
    methods: Mapping[str, Callable[[], Sequence[float]]], repeats: int, *, warm_ups: int
) -> dict[str, list[float]]:
    """Call the methods in turns, so that a disturbance meets all of them; the first rounds warm up and do not count.

    Args:
        methods: by name; each times itself and returns one number or more.
        repeats: rounds that count.
        warm_ups: rounds before those.

    Returns:
        Of each method's numbers, the medians over the rounds.
    """
    rounds: dict[str, list[Sequence[float]]] = {name: [] for name in methods}
    for _ in range(warm_ups + repeats):
        for name, method in methods.items():
            rounds[name].append(method())
    return {
        name: [statistics.median(values) for values in zip(*found[warm_ups:], strict=True)]
        for name, found in rounds.items()
    }
