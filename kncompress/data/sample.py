"""The sample text: the 106 Wikipedia articles that the package ``gensim`` carries (CC BY-SA), cleaned to prose.

Five of them (disambiguation pages, a project page) hold no running text; 101 remain. The split is by article and
fixed, because the bundled teacher was trained on the training articles. "Allah" is in training: WikiText-2, which the
teacher also saw, holds that article.
"""

import bz2
import hashlib
import importlib.metadata
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from kncompress.errors import UserError

_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_ALWAYS_TRAIN = {"Allah"}
_SHARES = {"test": 0.08, "validation": 0.06}

_BACK_MATTER = re.compile(
    r"^(see also|notes?|footnotes?|references?|sources?|citations?|bibliography|further reading|external links?|"
    r"notes and references|works cited|gallery|publications|filmography|awards|discography)$",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
_NOT_PROSE = re.compile(r"^[*#:;|!{}<]")
_SENTENCE_END = re.compile(r"[.!?:][\"')\]]*$")


def prose(wiki_text: str) -> str:
    """Paragraphs and headings of an article; lists, tables, captions and back matter are left out."""
    kept: list[str] = []
    heading = ""
    skipped_level = 0
    for raw in wiki_text.splitlines():
        line = re.sub(r"'{2,}", "", raw).strip()
        match = _HEADING.match(line)
        if match:
            level, heading = len(match.group(1)), match.group(2)
            if not skipped_level or level <= skipped_level:
                skipped_level = level if _BACK_MATTER.match(heading) else 0
            continue
        if skipped_level or _NOT_PROSE.match(line) or len(line) < 60 or not _SENTENCE_END.search(line):
            continue
        if heading:
            kept.append(heading)
            heading = ""
        kept.append(_tidy(line))
    return "\n\n".join(kept)


def _tidy(line: str) -> str:
    """Repairs what removed templates leave behind: double spaces, empty brackets, space before punctuation."""
    line = re.sub(r"\(\s*[,;]?\s*\)", "", line)
    line = re.sub(r"\(\s*[,;]\s*", "(", line)
    line = re.sub(r"\s+", " ", line)
    return re.sub(r" ([,.;:!?)])", r"\1", line).strip()


@lru_cache(maxsize=1)
def articles() -> dict[str, str]:
    """Title -> prose of every article, in the order of the file.

    Raises UserError where gensim is not installed.
    """
    path = _path()
    from gensim.corpora import wikicorpus

    found = {}
    with bz2.open(path, "rb") as stream:
        for title, text, _ in wikicorpus.extract_pages(stream, ("0",)):
            if text.lower().startswith("#redirect"):
                continue
            body = prose(wikicorpus.filter_wiki(text))
            if body:
                found[title] = f"{title}\n\n{body}"
    return found


def split_of() -> dict[str, str]:
    """Title -> train, validation or test: articles ordered by a hash of the title fill test, then validation."""
    texts = articles()
    total = sum(map(len, texts.values()))
    assigned = dict.fromkeys(texts, "train")
    free = sorted(texts.keys() - _ALWAYS_TRAIN, key=lambda title: hashlib.sha256(title.encode()).digest())
    queue = iter(free)
    for split, share in _SHARES.items():
        filled = 0
        while filled < share * total:
            title = next(queue)
            assigned[title] = split
            filled += len(texts[title])
    return assigned


def documents(split: str) -> list[str]:
    """Texts of the articles of a split."""
    assigned = split_of()
    return [text for title, text in articles().items() if split in ("all", assigned[title])]


def fingerprint() -> str:
    """Changes when the text or the way it is cleaned could have changed."""
    _path()
    own_code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return f"sample:gensim-{importlib.metadata.version('gensim')}:{own_code}"


def _path() -> Path:
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise UserError(
            "data.source=sample: the sample text is carried by gensim, which is not installed; "
            "install it by `pip install 'kncompress[sample]'` or give data.source a text file or folder"
        )
    return Path(spec.origin).parent / _FILE
