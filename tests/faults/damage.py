"""Damaged contents for hypothesis: those of real files with flipped, cut, doubled and foreign parts.

Hypothesis draws one seed for each input, by which all of it is made: many draws would cost ten times the parsers' time.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
_NUMBERS = [-1, 0, 1, 7, 0.5, 2**31, 2**63, 2**64, 10**30, -(10**6), 1e308, -1e308, 1e-320, float("inf"), float("nan")]
_TEXTS = ["", "a", "\n", "\0", "${oc.env:HOME}", "keep", "../..", "x" * 5000, "\u2028", "[", "1e999", "ü", "\x1b[2J"]
_FOREIGN = [b"\0", b"\xff", b"\n", b"[", b"{", b'"', b",", b":", b"-", b"9" * 30, b"\xe2\x80\xa8", b"&a ", b"*a", b"!!"]
LETTERS = "0123456789abcxyz()[]{}<>=+-*/\\.,:;'\"~@$%&!?#|^ \t\n\r\0\x1bäß\u0663\u2028\ud800\U0001f600"


def _made(make: Callable[[Random], T]) -> st.SearchStrategy[T]:
    return st.randoms(use_true_random=True).map(make)


def value(random: Random, depth: int = 2) -> Any:
    """Anything that JSON can hold, odd things first."""
    kind = random.randrange(8 if depth else 6)
    if kind == 6:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {random.choice(_TEXTS): value(random, depth - 1) for _ in range(random.randrange(4))}
    if kind == 5:
        return text_of(random)
    return random.choice(
        [[None], [True, False], _NUMBERS, _TEXTS, [random.randrange(-9, 99), random.gauss(0, 9)]][kind]
    )


def text_of(random: Random, letters: str = LETTERS, most: int = 30) -> str:
    """A text of up to ``most`` of the letters."""
    return "".join(random.choices(letters, k=random.randrange(most)))


def texts(letters: str = LETTERS, most: int = 30) -> st.SearchStrategy[str]:
    """Strategy of ``text_of``."""
    return _made(lambda random: text_of(random, letters, most))


def values() -> st.SearchStrategy[Any]:
    """Strategy of ``value``."""
    return _made(value)


def damaged(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of ``contents`` with up to three faults of its bytes."""
    return _made(lambda random: _damage(random, bytearray(random.choice(contents))))


def _damage(random: Random, content: bytearray) -> bytes:
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(content))
        end = min(len(content), at + random.randrange(40))
        match random.randrange(7):
            case 0 | 1 if at < len(content):
                content[at] ^= 1 << random.randrange(8)
            case 2:
                del content[at:]
            case 3:
                del content[at:end]
            case 4:
                content[at:at] = random.choice(_FOREIGN)
            case 5:
                content[at:at] = content[at:end]
            case _:
                content[at:end] = random.randbytes(random.randrange(20))
    return bytes(content)


def altered(documents: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """JSON of one of ``documents`` in which one or two values, at any depth, are others, missing, or too many."""
    return _made(lambda random: _alter(random, json.loads(json.dumps(random.choice(documents)))))


def _alter(random: Random, document: Any) -> bytes:
    for _ in range(random.randint(1, 2)):
        places = _places(document)
        if not places:
            break
        *path, last = random.choice(places)
        node = document
        for part in path:
            node = node[part]
        match random.randrange(5):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[random.choice(_TEXTS)] = value(random)
            case 1:
                node.append(value(random))
            case _:
                node[last] = value(random)
    return json.dumps(document).encode()


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a document."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, inner in pairs for place in [(*path, key), *_places(inner, (*path, key))]]
