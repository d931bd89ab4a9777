"""Text files as documents, read line by line: a file may be larger than the memory."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from kncompress.data import wikitext
from kncompress.errors import UserError

SUFFIXES = (".txt", ".text", ".md", ".tokens", ".raw")
LONGEST_LINE = 2**20
"""Characters after which a line is passed on unfinished."""
_SEPARATOR = re.compile(r"<\|(?:endoftext|doc)\|>[ \t]*\n?")
_EXTRACTED = re.compile(r"<doc [^>]*>\n")


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a file with their ends, which become ``\\n``. Raises UserError where it is not UTF-8."""
    try:
        with file.open(encoding="utf-8") as stream:
            while line := stream.readline(LONGEST_LINE):
                yield line
    except UnicodeDecodeError:
        raise UserError(f"data.source={file}: not UTF-8 text (byte {_first_bad_byte(file)})") from None
    except OSError as error:
        raise UserError(f"data.source={file}: cannot be read ({error.strerror})") from None


def _first_bad_byte(file: Path) -> int:
    """Position of the first byte that is not UTF-8: the decoder of a stream only knows it within its buffer."""
    position = 0
    with file.open("rb") as stream:
        for line in stream:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return position + error.start
            position += len(line)
    return position


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
        case "lines":
            # Rows as the Hugging Face data sets have them: blank ones empty, others with their line end.
            rows = (row for line in lines for row in line.splitlines(keepends=True) or [""])
            found = iter(["\n\n".join(row if row.strip() else "" for row in rows)])
        case _:
            found = split_documents(lines, cut)
    return (document for document in found if document.strip())


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


def content_hash(file: Path) -> str:
    """Hash of the bytes of a file; computed once a process for each state of it."""
    facts = file.stat()
    return _content_hash(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_hash(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
