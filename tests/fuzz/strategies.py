"""Inputs that are nearly right: valid ones with bytes or values changed, and values that nobody expects."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

# Sizes at the edges of what 16, 32 and 64 bits hold, and beyond.
EDGES = [0, 1, -1, 2, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**53]
EDGES += [2**60, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 10**30, 10**400]
_BYTES = st.binary(max_size=24)
_WORDS = st.sampled_from([struct.pack("<q", edge) for edge in EDGES if -(2**63) <= edge < 2**63])

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "a\0b",
            "../../etc/passwd",
            "/dev/zero",
            ".",
            "..",
            "\x1b[2J",
            "a\nb",
            "\udc80",
            "é",
            "nan",
            "inf",
        ]
    ),
    st.sampled_from(["1e400", "-1", "0x10", "1_000", "²", "1" * 5000, "$(touch x)", "; rm x", "null:5", "x" * 3000]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(EDGES),
    st.integers(-10, 5000),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def damaged(draw: Any, valid: bytes) -> bytes:
    """A file with bytes flipped, overwritten by extreme numbers, cut off, taken out, doubled or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        until = at + draw(st.integers(1, 32))
        kind = draw(st.sampled_from(["flip", "word", "cut", "remove", "double", "insert", "replace"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "word":
            data[at : at + 8] = draw(_WORDS)
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at:until]
        elif kind == "double":
            data[at:at] = data[at:until]
        elif kind == "insert":
            data[at:at] = draw(_BYTES)
        elif kind == "replace":
            new = draw(_BYTES)
            data[at : at + len(new)] = new
    return bytes(data)


@st.composite
def changed(draw: Any, valid: Any) -> Any:
    """Nested mappings and lists with some values replaced, removed, or added."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place, key = draw(st.sampled_from(_places(content)))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            place[key] = draw(VALUES)
        elif kind == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(TEXT)] = draw(VALUES)
        if not content:
            break
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found.append((content, key))
        found += _places(value)
    return found


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: with other values, with damaged bytes, or nested deeply."""
    return st.one_of(
        changed(valid).map(lambda content: json.dumps(content).encode("utf-8", "surrogatepass")),
        damaged(json.dumps(valid).encode()),
        VALUES.map(lambda content: json.dumps(content).encode("utf-8", "surrogatepass")),
        st.integers(1, 200_000).map(lambda depth: b"[" * depth),
    )
