"""Where text comes from: the sample, files and folders, data sets; read as documents of a split."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kncompress.config import DataConfig
from kncompress.data import sample
from kncompress.data.files import PROSE, TextFile, content_hash, in_folder, text_file, text_lines
from kncompress.data.prose import PUBLISHED, documents_of, row_documents
from kncompress.data.row_files import COLUMN, row_texts
from kncompress.data.rows import HUB, SPLITS, RowSource, hub_source
from kncompress.data.split import carve, chosen, held_out_shares, place
from kncompress.errors import UserError
from kncompress.runs.process import tell

IN_MEMORY = 64 * 2**20
"""Bytes up to which the files of a source are split as a whole; larger ones document by document."""
CUT = 100_000
"""Characters after which a plain document of a large source ends at the next paragraph."""


OWN = "model"
"""An entry of ``data.source``: the text that the model itself writes (``compression.own_text``)."""


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
    """The sample, or files of text and rows with the split that their names, and those of their folders, give them."""

    name: str
    key: str = "data.source"
    files: tuple[TextFile, ...] = ()
    root: Path = Path()
    """The folder that was named, or the one that the file lies in."""
    text_format: str = "auto"
    column: str | None = None

    @property
    def is_sample(self) -> bool:
        return not self.files

    @property
    def has_splits(self) -> bool:
        """Whether the source itself says what is test."""
        return self.is_sample or "test" in self._parts()

    @property
    def is_large(self) -> bool:
        """Whether it is never held in memory as a whole."""
        return sum(file.size for file in self.files) > IN_MEMORY

    def documents(self, split: str, held_out: Sequence[str] = ("validation", "test"), seed: int = 0) -> Iterable[str]:
        """Documents of ``split`` (or ``all``); ``held_out`` are the splits that must be carved out of the text.

        Splits that the names tell hold. Of the other text 5% of the characters go to each further held-out split, of
        documents ordered by a hash of ``seed`` and their text; of a large source some of the documents, by their hash.
        """
        if self.is_sample:
            return sample.documents(split)
        if split == "all":
            return self._read(self.files)
        parts = self._parts()
        if split in parts and split != "train":
            return self._read(parts[split])
        missing = [name for name in held_out if name not in parts]
        if not missing:
            return self._read(parts.get(split, ()))
        if self.is_large:
            shares = held_out_shares(self.size("train"))
            return (d for d in self._read(parts.get("train", ())) if place(d, missing, seed, shares) == split)
        return carve(list(self._read(parts.get("train", ()))), missing, seed).get(split, [])

    @property
    def is_wikitext(self) -> bool:
        """Whether all of it is WikiText, as its names say."""
        return not self.is_sample and all(self._format(file) == "wikitext" for file in self.files)

    def carves(self, held_out: Sequence[str]) -> bool:
        """Whether a split of ``held_out`` is taken out of its training text."""
        return not self.is_sample and any(split not in self._parts() for split in held_out)

    def size(self, split: str) -> int:
        """About the characters that ``documents`` goes through."""
        if self.is_sample:
            return sum(map(len, sample.documents(split)))
        parts = self._parts()
        read = self.files if split == "all" else parts.get(split, parts.get("train", ()))
        return sum(file.size for file in read)

    def share(self, split: str, held_out: Sequence[str]) -> float:
        """About the part of ``size`` that the documents of ``split`` have."""
        if self.is_sample or split == "all" or (split != "train" and split in self._parts()):
            return 1.0
        shares = held_out_shares(self.size("train"))
        missing = [name for name in held_out if name not in self._parts()]
        return shares[split] if split in missing else 1.0 - sum(shares[name] for name in missing)

    def _parts(self) -> dict[str, list[TextFile]]:
        """The files of each split that is named; all of them are ``train`` where neither that nor a test is."""
        found: dict[str, list[TextFile]] = {}
        for file in self.files:
            found.setdefault(split_name(file.path.relative_to(self.root)) or "train", []).append(file)
        return found if found.keys() & {"train", "test"} else {"train": list(self.files)}

    def fingerprint(self) -> str:
        """Changes with the content of the files, not with their names or dates."""
        if self.is_sample:
            return sample.fingerprint()
        digest = hashlib.sha256()
        for split, files in self._parts().items():
            for file in files:
                read_as = f"{file.rows}.{self.column or COLUMN}" if self._has_rows(file) else "text"
                digest.update(f"{split}:{self._format(file)}:{read_as}:{content_hash(file.path)};".encode())
        return digest.hexdigest()

    def _has_rows(self, file: TextFile) -> bool:
        # A text that happens to be lines of JSON can be had as it stands, by saying so.
        return file.rows is not None and (self.text_format == "auto" or file.ending not in PROSE)

    def _format(self, file: TextFile) -> str:
        if self.text_format != "auto":
            return self.text_format
        if file.rows is not None:
            return "wikitext" if Path(self.name).name.lower() == "wikitext" else "plain"
        return "wikitext" if file.ending in (".tokens", ".raw") else "plain"

    def _read(self, chosen_files: Iterable[TextFile]) -> Iterator[str]:
        cut = CUT if self.is_large else None
        for file in chosen_files:
            if self._has_rows(file):
                yield from row_documents(row_texts(file, self.key, self.column), self._format(file))
            else:
                yield from documents_of(text_lines(file.path, self.key), self._format(file), cut)


Source = FileSource | RowSource


def split_name(file: Path) -> str | None:
    """``wiki.valid.tokens``, ``valid/a.parquet`` -> validation; None where a path names no split."""
    words = set(re.split(r"[^a-z]+", file.as_posix().lower()))
    return next((split for split, names in SPLITS.items() if words & names), None)


def find_sources(value: Any, key: str, text_format: str = "auto", column: str | None = None) -> list[Source]:
    """Resolves ``data.source``, ``data.validation`` or ``data.test``; reads and downloads nothing.

    Raises UserError naming ``key`` where a file is missing or no text, a folder has no text, a data set of the hub is
    neither in the cache nor within reach, or the list is empty.
    """
    named = entries(value, key)
    if not named:
        raise UserError(f"{key}=[]: give `sample`, a text file, a folder of text files, hub:ID, or a list of these")
    return [_find(name, key, text_format, column) for name in named]


def entries(value: Any, key: str = "data.source") -> list[str]:
    """The names in ``data.source`` or the like. Raises UserError, which names ``key``, for anything else."""
    named = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(entry, str) for entry in named):
        raise UserError(f"{key}={value}: must be a text or a list of texts; ./{value} is a file")
    return named


def without_own(config: DataConfig) -> DataConfig:
    """``config`` without the model's own text, which is there when the model is; the sample where nothing is left."""
    named = entries(config.source)
    return replace(config, source=[name for name in named if name != OWN] or "sample") if OWN in named else config


def sources_of(config: DataConfig, name: str = "source") -> list[Source]:
    """The sources of ``data.source``, or of ``validation`` or ``test`` where those name some. Raises UserError."""
    own = getattr(config, name, None)
    name = "source" if own is None else name
    return find_sources(getattr(config, name), f"data.{name}", config.text_format, config.column)


def split_sources(config: DataConfig, split: str) -> list[Source]:
    """The sources that a split is read from: its own, or those of the whole text. Raises UserError."""
    return sources_of(config, split if split in ("validation", "test") else "source")


def _find(entry: str, key: str, text_format: str, column: str | None) -> Source:
    if entry == "sample":
        if Path(entry).exists():
            tell(f"{key}=sample: the package's sample text; the folder or file of that name here is ./sample")
        return FileSource("sample", key)
    if entry == OWN:
        raise UserError(f"{key}=model: the model's own text is for data.source of compress, plan and train")
    if entry.startswith(HUB):
        return hub_source(entry, key, text_format, column)
    path = Path(entry).expanduser()
    if path.is_dir():
        return FileSource(entry, key, tuple(in_folder(path, key, column or COLUMN)), path, text_format, column)
    if not path.is_file():
        raise UserError(
            f"{key}={entry}: no such file or folder; give `sample`, a text file or a folder of them, hub:ID"
        )
    return FileSource(entry, key, (text_file(path, key),), path.parent, text_format, column)


def read_split(config: DataConfig, split: str, reading: Reading | None = None) -> Iterator[str]:
    """Documents of a split over all sources of a data configuration, read as they are taken.

    ``reading``, where given, follows them. Raises UserError where there is no text.
    """
    own = getattr(config, split, None) if split in ("validation", "test") else None
    key = "data.source" if own is None else f"data.{split}"
    held_out = _held_out(config)
    parts = []
    for source in split_sources(config, split):
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


def read_kinds(config: DataConfig) -> list[tuple[float, Iterator[str]]]:
    """(share, documents) of each kind of training text: a source of the list, WikiText of it as prose and as published.

    The latter only where files or splits are named as training text, since other documents are held out by a hash of
    their text.
    """
    held_out = _held_out(config)
    kinds = []
    for source in sources_of(config):
        forms: list[Source] = [source]
        if source.is_wikitext and config.text_format == "auto" and not source.carves(held_out):
            forms.append(replace(source, text_format=PUBLISHED))
        for form in forms:
            found: Iterator[str] = iter(form.documents("train", held_out, config.seed))
            if config.fraction < 1:
                found = (d for d in found if chosen(d, config.fraction, config.seed))
            kinds.append((1 / len(forms), found))
    return kinds


def _held_out(config: DataConfig) -> list[str]:
    """Splits that have no source of their own."""
    return [split for split in ("test", "validation") if getattr(config, split) is None]


def fingerprint(config: DataConfig, split: str) -> str:
    """Key of the text of a split: what the sources hold and how they are split."""
    parts = [split, str(config.seed)]
    if split == "train" and config.fraction < 1:
        parts.append(f"fraction={config.fraction}")
    for key in ("source", "validation", "test"):
        if getattr(config, key) is not None:
            parts += [key, *(source.fingerprint() for source in sources_of(config, key))]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
