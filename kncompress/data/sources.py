"""Where text comes from: the sample, files and folders, read as documents of a split."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kncompress.config import DataConfig
from kncompress.data import sample, wikitext
from kncompress.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".tokens", ".raw")
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"valid", "validation", "val", "dev"},
    "test": {"test"},
}
_SEPARATOR = re.compile(r"^<\|(?:endoftext|doc)\|>[ \t]*$", re.MULTILINE)
_EXTRACTED = re.compile(r"^<doc [^>]*>\n(.*?)\n?^</doc>", re.MULTILINE | re.DOTALL)
_HELD_OUT = {"test": 0.05, "validation": 0.05}


@dataclass(frozen=True)
class Source:
    """One entry of ``data.source``: the sample, or text files with the split that their names give them."""

    name: str
    files: tuple[Path, ...] = ()
    text_format: str = "auto"

    @property
    def is_sample(self) -> bool:
        return not self.files

    @property
    def has_splits(self) -> bool:
        """Whether the source itself says what is training and what is test."""
        return self.is_sample or "test" in self._named_splits()

    def _named_splits(self) -> set[str]:
        return {split for file in self.files if (split := split_name(file))}

    def documents(self, split: str, held_out: Sequence[str] = ("validation", "test"), seed: int = 0) -> list[str]:
        """Documents of ``split`` (or ``all``); ``held_out`` are the splits that must be carved out of the text.

        Where the source names its splits, those hold. Otherwise documents are ordered by a hash of ``seed`` and
        their text, and 5% of the characters go to each held-out split.
        """
        if self.is_sample:
            return sample.documents(split)
        if split == "all":
            return [document for file in self.files for document in self._read(file)]
        if self.has_splits:
            return [d for file in self.files if (split_name(file) or "train") == split for d in self._read(file)]
        parts = carve(self.documents("all"), held_out, seed)
        return parts.get(split, [])

    def fingerprint(self) -> str:
        """Changes with the content of the files, not with their names or dates."""
        if self.is_sample:
            return sample.fingerprint()
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{split_name(file)}:{self._format(file)}:{content};".encode())
        return digest.hexdigest()

    def _format(self, file: Path) -> str:
        if self.text_format != "auto":
            return self.text_format
        return "wikitext" if file.suffix in (".tokens", ".raw") else "plain"

    def _read(self, file: Path) -> Iterator[str]:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.source={file}: not UTF-8 text (byte {error.start})") from None
        found: Iterator[str]
        match self._format(file):
            case "wikitext":
                found = map(wikitext.to_prose, wikitext.articles(text))
            case "lines":
                # Rows as the Hugging Face data sets have them: blank ones empty, others with their line end.
                rows = text.splitlines(keepends=True)
                found = iter(["\n\n".join(row if row.strip() else "" for row in rows)])
            case _:
                found = split_documents(text)
        return (document for document in found if document.strip())


def split_name(file: Path) -> str | None:
    """``wiki.valid.tokens`` -> validation; None where the file's name names no split."""
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in _SPLIT_NAMES.items() if words & names), None)


def split_documents(text: str) -> Iterator[str]:
    """Documents of a plain text: WikiExtractor's ``<doc>`` elements, parts between ``<|endoftext|>`` lines, or all."""
    if text.lstrip().startswith("<doc "):
        return (match.group(1).strip() for match in _EXTRACTED.finditer(text))
    return (part.strip() for part in _SEPARATOR.split(text))


def carve(documents: list[str], held_out: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Splits documents at random but reproducibly; a text of few documents is cut at paragraphs instead."""
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
        while order and filled < _HELD_OUT[split] * total and len(order) > 1:
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


def find_sources(value: Any, key: str, text_format: str = "auto") -> list[Source]:
    """Resolves ``data.source``, ``data.validation`` or ``data.test``.

    Raises UserError naming ``key`` where a file is missing, a folder has no text or the list is empty.
    """
    entries = [value] if isinstance(value, str) else list(value)
    if not entries:
        raise UserError(f"{key}=[]: give `sample`, a text file, a folder of text files, or a list of these")
    return [_find(str(entry), key, text_format) for entry in entries]


def _find(entry: str, key: str, text_format: str) -> Source:
    if entry == "sample":
        return Source("sample")
    path = Path(entry).expanduser()
    if path.is_dir():
        files = tuple(sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()))
        if not files:
            raise UserError(f"{key}={entry}: the folder holds no text file ({', '.join(TEXT_SUFFIXES)})")
        return Source(entry, files, text_format)
    if not path.is_file():
        raise UserError(f"{key}={entry}: no such file or folder; give `sample`, a text file or a folder of them")
    return Source(entry, (path,), text_format)


def read_split(config: DataConfig, split: str) -> list[str]:
    """Documents of a split over all sources of a data configuration. Raises UserError where there is no text."""
    own = getattr(config, split, None) if split in ("validation", "test") else None
    if own is not None:
        key = f"data.{split}"
        sources = find_sources(own, key, config.text_format)
        found = [d for s in sources for d in s.documents(split if s.has_splits else "all")]
    else:
        key = "data.source"
        held_out = [s for s in ("test", "validation") if getattr(config, s) is None]
        sources = find_sources(config.source, key, config.text_format)
        if split == "auto":
            found = [d for s in sources for d in s.documents("test" if s.has_splits else "all")]
        else:
            found = [d for s in sources for d in s.documents(split, held_out, config.seed)]
    if not any(document.strip() for document in found):
        raise UserError(f"{key}={getattr(config, key.split('.')[1])}: no text in the {split} split")
    return found


def fingerprint(config: DataConfig, split: str) -> str:
    """Key of the text of a split: what the files hold and how they are split."""
    parts = [split, str(config.seed)]
    for key in ("source", "validation", "test"):
        value = getattr(config, key)
        if value is not None:
            parts += [key, *(s.fingerprint() for s in find_sources(value, f"data.{key}", config.text_format))]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
