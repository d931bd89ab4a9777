"""Pieces from all over a text: a short text that stands for a long one, and for every kind of it.

The first tokens of a corpus are a handful of articles of its first source. What is fitted to them knows little else.
"""

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kncompress.config import DataConfig
from kncompress.data.build import encode
from kncompress.data.sources import read_kinds
from kncompress.errors import UserError

LENGTH = 2000
"""Characters of a piece, about: some 450 tokens of English."""
READ_AT_MOST = 2**26
"""Characters of each source that pieces are drawn from: minutes would go by before the end of a large corpus."""
_SHORT = 8
"""Tokens of the shortest pieces (documents of a line) of which enough are kept."""


def spread_tokens(data: DataConfig, tokenizer: Any, wanted: int) -> np.ndarray:
    """Tokens of pieces of the training split, (n,) int64, ``wanted`` or, of a shorter text, all; an end-of-text each.

    Every source of a list gives the same number of tokens while it has some, in turns. WikiText that comes with splits
    of its own is taken as prose and as published, half of each: a fit should not hang on typography. ``data.seed``
    chooses the pieces.

    Raises:
        UserError: there is no text.
    """
    kinds = read_kinds(data)
    total = sum(share for share, _ in kinds)
    drawn = [
        _Kind(share / total, draw(documents, round(wanted * share / total / _SHORT) + 64, data.seed))
        for share, documents in kinds
    ]
    end_of_text = data.text_format != "lines"
    found: list[np.ndarray] = []
    count = 0
    while count < wanted and (left := [kind for kind in drawn if kind.pieces]):
        kind = min(left, key=lambda kind: kind.tokens / kind.share)
        piece = kind.pieces.pop()
        ids = encode([piece if end_of_text else f"{piece}\n\n"], tokenizer, end_of_text)[0]
        kind.tokens += len(ids)
        count += len(ids)
        found.append(ids)
    if not found:
        raise UserError(f"data.source={data.source}: no text in the train split")
    return np.concatenate(found)[:wanted].astype(np.int64)


@dataclass
class _Kind:
    share: float
    pieces: list[str]
    """In reverse order."""
    tokens: int = 0


def draw(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """At most ``count`` pieces of the documents' beginning, 64 million characters, at random, in random order."""
    chance = random.Random(seed)
    found = ((chance.random(), piece) for document in _at_most(documents) for piece in pieces(document))
    return [piece for _, piece in heapq.nsmallest(count, found, key=lambda pair: pair[0])][::-1]


def _at_most(documents: Iterable[str]) -> Iterator[str]:
    read = 0
    for document in documents:
        yield document
        read += len(document)
        if read >= READ_AT_MOST:
            return


def pieces(document: str) -> Iterator[str]:
    """A document in parts of about ``LENGTH`` characters, which end with a paragraph or, in a long one, a word."""
    part: list[str] = []
    length = 0
    for paragraph in _paragraphs(document):
        part.append(paragraph)
        length += len(paragraph)
        if length >= LENGTH:
            yield from _if_text(part)
            part, length = [], 0
    yield from _if_text(part)


def _if_text(part: Sequence[str]) -> Iterator[str]:
    text = "\n\n".join(part)
    if text.strip():
        yield text


def _paragraphs(document: str) -> Iterator[str]:
    for paragraph in document.split("\n\n"):
        begin = 0
        while len(paragraph) - begin > 2 * LENGTH:
            end = paragraph.rfind(" ", begin + LENGTH // 2, begin + LENGTH)
            end = end if end > 0 else begin + LENGTH
            yield paragraph[begin:end]
            begin = end
        yield paragraph[begin:]
