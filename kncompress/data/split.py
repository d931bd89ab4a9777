"""Which document falls into which split, at random but reproducibly."""

import hashlib
from collections.abc import Mapping, Sequence

HELD_OUT = {"test": 0.05, "validation": 0.05}
"""Share of the text that a held-out split gets where the source names none."""
_HELD_OUT_OF_MUCH = {"test": 0.005, "validation": 0.005}
_MUCH = 1 << 30


def held_out_shares(size: int) -> dict[str, float]:
    """Share of each held-out split in a source of ``size`` bytes: 5%, and of more than a gigabyte 0.5%."""
    return _HELD_OUT_OF_MUCH if size > _MUCH else HELD_OUT


def carve(documents: list[str], held_out: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Splits documents that are all in memory; a text of few documents is cut at paragraphs instead."""
    if len(documents) < 20:
        documents = [p for document in documents for p in _passages(document)]
        order = list(range(len(documents)))
    else:
        keys = [hashlib.sha256(f"{seed}:{document}".encode()).digest() for document in documents]
        order = sorted(range(len(documents)), key=keys.__getitem__)
    parts: dict[str, list[str]] = {}
    total = sum(map(len, documents))
    for split in held_out:
        parts[split], filled = [], 0
        while order and filled < HELD_OUT[split] * total and len(order) > 1:
            parts[split].append(documents[order.pop()])
            filled += len(parts[split][-1])
    parts["train"] = [documents[i] for i in sorted(order)]
    return parts


def _passages(document: str, parts: int = 40) -> list[str]:
    """A document cut at paragraph (else line, else word) ends into about ``parts`` passages."""
    for glue in ("\n\n", "\n", " "):
        pieces = document.split(glue)
        if len(pieces) >= parts:
            break
    size = max(1, len(document) // parts)
    passages, current, length = [], [], 0
    for piece in pieces:
        current.append(piece)
        length += len(piece)
        if length >= size:
            passages.append(glue.join(current))
            current, length = [], 0
    return passages + ([glue.join(current)] if current else [])


def place(document: str, held_out: Sequence[str], seed: int, shares: Mapping[str, float] = HELD_OUT) -> str:
    """The split of one document by its hash alone, for a corpus too large for memory."""
    point = _point("split", document, seed)
    for split in held_out:
        if point < shares[split]:
            return split
        point -= shares[split]
    return "train"


def chosen(document: str, fraction: float, seed: int) -> bool:
    """Whether a document is among the ``fraction`` of the documents that its hash and ``seed`` choose."""
    return _point("fraction", document, seed) < fraction


def _point(purpose: str, document: str, seed: int) -> float:
    """A number in [0, 1), evenly spread; independent for each purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{document}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
