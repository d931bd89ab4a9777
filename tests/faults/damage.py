"""Damaged contents for hypothesis: those of real files with flipped, cut, doubled and foreign parts."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

_NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(10**6), 1e308, -1e308, 1e-320])
_ODD = st.sampled_from(
    ["", "\n", "\0", "${oc.env:HOME}", "keep", "../..", "x" * 5000, "\u2028", "[", "{}", "1e999", "ü"]
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, st.integers(), st.floats(), _ODD, st.text(max_size=20))
VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_ODD, inner, max_size=3))
"""What JSON can hold, odd values first."""
_FOREIGN = [
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"[",
    b"{",
    b'"',
    b",",
    b":",
    b"-",
    b"9" * 30,
    b"\xe2\x80\xa8",
    b"&a ",
    b"*a",
    b"!!",
]


@st.composite
def damaged(draw: Any, contents: Sequence[bytes]) -> bytes:
    """One of ``contents`` with up to three faults of its bytes."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["flip", "cut", "take", "put", "double", "random"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "take":
                del content[at:end]
            case "put":
                content[at:at] = draw(st.sampled_from(_FOREIGN))
            case "double":
                content[at:at] = content[at:end]
            case _:
                content[at:end] = draw(st.binary(max_size=20))
    return bytes(content)


@st.composite
def altered(draw: Any, documents: Sequence[Any]) -> bytes:
    """JSON of one of ``documents`` in which a value, at any depth, is another, missing, or one too many."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 2))):
        node, places = document, _places(document)
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        for part in path:
            node = node[part]
        match draw(st.sampled_from(["another", "missing", "more"])):
            case "another":
                node[last] = draw(VALUES)
            case "missing":
                del node[last]
            case _ if isinstance(node, dict):
                node[draw(_ODD)] = draw(VALUES)
            case _:
                node.append(draw(VALUES))
    return json.dumps(document).encode()


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in [(*path, key), *_places(inner, (*path, key))]]
