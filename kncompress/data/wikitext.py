"""WikiText as published and back to prose.

WikiText (Merity et al. 2016, arXiv 1609.07843) separates every token by a space, marks in-word hyphens and number
separators as ``@-@``, ``@,@`` and ``@.@``, writes headings as `` = Title = `` and rare words as ``<unk>``.
"""

import re
from collections.abc import Iterable, Iterator

_TITLE = re.compile(r"^\s*= ([^=].*?) =\s*$")
_HEADING = re.compile(r"^\s*(?:= )+(.+?)(?: =)+\s*$")

# Applied in order; each undoes one habit of the Moses tokeniser that made the files.
_RULES = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%\)\]])(?=[\s\"'\)\],.;:!?]|$)"), r"\1"),
    (re.compile(r"([\(\[]) "), r"\1"),
    (re.compile(r"([$£€]) (?=\d)"), r"\1"),
    (re.compile(r" '(s|t|re|ll|ve|d|m)\b"), r"'\1"),
    (re.compile(r"s ' (?=[a-z])"), "s' "),
    (re.compile(r"(?<=\d) – (?=\d)"), "–"),
    (re.compile(r" / "), "/"),
]
_QUOTED = re.compile(r'(^|[\s(\[])" ?([^"]*?) ?"(?=[\s,.;:!?)\]]|$)')


def articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each article; an article begins at a top-level heading."""
    article: list[str] = []
    for line in (part for piece in lines for part in piece.removesuffix("\n").split("\n")):
        if _TITLE.match(line) and article:
            yield article
            article = []
        if line.strip() or article:
            article.append(line)
    if article:
        yield article


def to_prose(lines: list[str]) -> str:
    """An article as running text: headings as plain lines, spacing and ``@-@`` marks undone, ``<unk>`` kept."""
    paragraphs = []
    for line in lines:
        if not line.strip():
            continue
        heading = _HEADING.match(line)
        paragraphs.append(_detokenize(heading.group(1) if heading else line))
    return "\n\n".join(paragraphs)


def _detokenize(line: str) -> str:
    line = f"{line.strip()}"
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return _QUOTED.sub(r'\1"\2"', line)
