"""Running text as documents, line by line: a text may be larger than the memory."""

import re
from collections.abc import Iterable, Iterator

from kncompress.data import wikitext

PUBLISHED = "published"
"""Beside the formats of ``data.text_format``: articles of WikiText, each as ``lines`` has the whole."""
_SEPARATOR = re.compile(r"<\|(?:endoftext|doc)\|>[ \t]*\n?")
_EXTRACTED = re.compile(r"<doc [^>]*>\n")


def documents_of(lines: Iterable[str], text_format: str, cut: int | None = None) -> Iterator[str]:
    """Documents of a text in one of the formats of ``data.text_format`` (not ``auto``); blank ones are left out.

    Args:
        lines: the text, in pieces that end where lines end.
        text_format: ``plain``, ``wikitext`` or ``lines``.
        cut: characters after which a plain document ends at the next paragraph; None: never.
    """
    found: Iterator[str]
    match text_format:
        case "wikitext":
            found = map(wikitext.to_prose, wikitext.articles(lines))
        case "published":
            found = map(_published, wikitext.articles(lines))
        case "lines":
            # Rows as the Hugging Face data sets have them: blank ones empty, others with their line end.
            rows = (row for line in lines for row in _with_ends(line))
            found = iter(["\n\n".join(row if row.strip() else "" for row in rows)])
        case _:
            found = split_documents(lines, cut)
    return (document for document in found if document.strip())


def _with_ends(text: str) -> list[str]:
    """Lines of ``text`` with their ends; only a line feed is one, not U+2028 or a form feed (``splitlines``)."""
    *lines, rest = text.split("\n")
    return [*(f"{line}\n" for line in lines), *([rest] if rest or not lines else [])]


def _published(article: list[str]) -> str:
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in article)


def row_documents(rows: Iterable[str], text_format: str) -> Iterator[str]:
    """Documents of rows: each is one, except of WikiText, whose rows are the lines of the published file."""
    if text_format == "plain":
        return (row.strip() for row in rows if row.strip())
    return documents_of((row or "\n" for row in rows), text_format)


def split_documents(lines: Iterable[str], cut: int | None = None) -> Iterator[str]:
    """Documents of a plain text: WikiExtractor's ``<doc>`` elements, parts between ``<|endoftext|>`` lines, or all."""
    lines = iter(lines)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    extracted = bool(head) and head[-1].lstrip().startswith("<doc ")
    rest = (line for part in (head, lines) for line in part)
    return _extracted(rest) if extracted else _separated(rest, cut)


def _separated(lines: Iterable[str], cut: int | None) -> Iterator[str]:
    parts: list[str] = []
    length = 0
    for line in lines:
        ends = _SEPARATOR.fullmatch(line) is not None
        if not ends:
            parts.append(line)
            length += len(line)
        if ends or (cut and (length >= 2 * cut or (length >= cut and not line.strip()))):
            yield "".join(parts).strip()
            parts, length = [], 0
    yield "".join(parts).strip()


def _extracted(lines: Iterable[str]) -> Iterator[str]:
    inside: list[str] | None = None
    for line in lines:
        if inside is None:
            inside = [] if _EXTRACTED.fullmatch(line) else None
        elif line.startswith("</doc>"):
            yield "".join(inside).strip()
            inside = None
        else:
            inside.append(line)
