"""Where text comes from: the sample, files and folders, data sets; read as documents of a split."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kncompress.config import DataConfig
from kncompress.data import files, rows, sample
from kncompress.data.rows import HUB, SPLITS, RowSource, hub_source
from kncompress.data.split import carve, chosen, held_out_shares, place
from kncompress.errors import UserError

IN_MEMORY = 64 * 2**20
"""Bytes up to which the files of a source are split as a whole; larger ones document by document."""
CUT = 100_000
"""Characters after which a plain document of a large source ends at the next paragraph."""


@dataclass
class Reading:
    """How far a text has been read: characters, of about ``total``."""

    total: int = 0
    done: int = 0

    def watch(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents, counted as they are taken."""
        for document in documents:
            self.done += len(document)
            yield document


@dataclass(frozen=True)
class FileSource:
    """The sample, or text files with the split that their names give them."""

    name: str
    files: tuple[Path, ...] = ()
    text_format: str = "auto"

    @property
    def is_sample(self) -> bool:
        return not self.files

    @property
    def has_splits(self) -> bool:
        """Whether the source itself says what is training and what is test."""
        return self.is_sample or any(split_name(file) == "test" for file in self.files)

    @property
    def is_large(self) -> bool:
        """Whether it is never held in memory as a whole."""
        return sum(file.stat().st_size for file in self.files) > IN_MEMORY

    def documents(self, split: str, held_out: Sequence[str] = ("validation", "test"), seed: int = 0) -> Iterable[str]:
        """Documents of ``split`` (or ``all``); ``held_out`` are the splits that must be carved out of the text.

        Where the source names its splits, those hold. Otherwise 5% of the characters go to each held-out split, of
        documents ordered by a hash of ``seed`` and their text; of a large source some of the documents, by their hash.
        """
        if self.is_sample:
            return sample.documents(split)
        if split == "all":
            return self._read(self.files)
        if self.has_splits:
            return self._read(file for file in self.files if (split_name(file) or "train") == split)
        if self.is_large:
            shares = held_out_shares(self.size("all"))
            return (d for d in self._read(self.files) if place(d, held_out, seed, shares) == split)
        return carve(list(self._read(self.files)), held_out, seed).get(split, [])

    def size(self, split: str) -> int:
        """About the characters of ``split``; of a source without splits those of all its text."""
        if self.is_sample:
            return sum(map(len, sample.documents(split)))
        named = self.has_splits and split != "all"
        return sum(f.stat().st_size for f in self.files if not named or (split_name(f) or "train") == split)

    def share(self, split: str, held_out: Sequence[str]) -> float:
        """About the part of ``size`` that the documents of ``split`` have."""
        if self.has_splits or split == "all":
            return 1.0
        shares = held_out_shares(self.size("all"))
        return shares[split] if split in held_out else 1.0 - sum(shares[name] for name in held_out)

    def fingerprint(self) -> str:
        """Changes with the content of the files, not with their names or dates."""
        if self.is_sample:
            return sample.fingerprint()
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{split_name(file)}:{self._format(file)}:{files.content_hash(file)};".encode())
        return digest.hexdigest()

    def _format(self, file: Path) -> str:
        if self.text_format != "auto":
            return self.text_format
        return "wikitext" if file.suffix in (".tokens", ".raw") else "plain"

    def _read(self, chosen_files: Iterable[Path]) -> Iterator[str]:
        cut = CUT if self.is_large else None
        for file in chosen_files:
            yield from files.documents_of(files.text_lines(file), self._format(file), cut)


Source = FileSource | RowSource


def split_name(file: Path) -> str | None:
    """``wiki.valid.tokens`` -> validation; None where the file's name names no split."""
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in SPLITS.items() if words & names), None)


def find_sources(value: Any, key: str, text_format: str = "auto") -> list[Source]:
    """Resolves ``data.source``, ``data.validation`` or ``data.test``; reads and downloads nothing.

    Raises UserError naming ``key`` where a file is missing, a folder has no text, a data set of the hub is neither in
    the cache nor within reach, or the list is empty.
    """
    entries = [value] if isinstance(value, str) else list(value)
    if not entries:
        raise UserError(f"{key}=[]: give `sample`, a text file, a folder of text files, hub:ID, or a list of these")
    return [_find(str(entry), key, text_format) for entry in entries]


def _find(entry: str, key: str, text_format: str) -> Source:
    if entry == "sample":
        return FileSource("sample")
    if entry.startswith(HUB):
        return hub_source(entry, key, text_format)
    path = Path(entry).expanduser()
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        found = tuple(file for file in inside if file.suffix in files.SUFFIXES)
        # The README of a data set is no text of it.
        if any(f.suffix in rows.SUFFIXES for f in inside) and all(f.suffix == ".md" for f in found):
            return RowSource(entry, key, str(path), None, text_format)
        if not found:
            every = ", ".join(files.SUFFIXES + rows.SUFFIXES)
            raise UserError(f"{key}={entry}: the folder holds no text file ({every})")
        return FileSource(entry, found, text_format)
    if not path.is_file():
        raise UserError(
            f"{key}={entry}: no such file or folder; give `sample`, a text file or a folder of them, hub:ID"
        )
    if path.suffix in rows.SUFFIXES:
        return RowSource(entry, key, str(path), None, text_format)
    return FileSource(entry, (path,), text_format)


def read_split(config: DataConfig, split: str, reading: Reading | None = None) -> Iterator[str]:
    """Documents of a split over all sources of a data configuration, read as they are taken.

    ``reading``, where given, follows them. Raises UserError where there is no text.
    """
    own = getattr(config, split, None) if split in ("validation", "test") else None
    key = "data.source" if own is None else f"data.{split}"
    held_out = [s for s in ("test", "validation") if getattr(config, s) is None]
    sources = find_sources(config.source if own is None else own, key, config.text_format)
    parts = []
    for source in sources:
        wanted = split
        if own is not None and not source.has_splits:
            wanted = "all"
        elif split == "auto":
            wanted = "test" if source.has_splits else "all"
        parts.append((source, wanted))
    reading = reading or Reading()
    reading.total = round(sum(s.size(wanted) * s.share(wanted, held_out) for s, wanted in parts))
    found = reading.watch(d for s, wanted in parts for d in s.documents(wanted, held_out, config.seed))
    if split == "train" and config.fraction < 1:
        found = (d for d in found if chosen(d, config.fraction, config.seed))
    head = []
    for document in found:
        head.append(document)
        if document.strip():
            return itertools.chain(head, found)
    less = f" (data.fraction={config.fraction})" if split == "train" and config.fraction < 1 else ""
    raise UserError(f"{key}={getattr(config, key.split('.')[1])}: no text in the {split} split{less}")


def fingerprint(config: DataConfig, split: str) -> str:
    """Key of the text of a split: what the sources hold and how they are split."""
    parts = [split, str(config.seed)]
    if split == "train" and config.fraction < 1:
        parts.append(f"fraction={config.fraction}")
    for key in ("source", "validation", "test"):
        value = getattr(config, key)
        if value is not None:
            parts += [key, *(s.fingerprint() for s in find_sources(value, f"data.{key}", config.text_format))]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
