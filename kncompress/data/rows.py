"""Text from the library ``datasets``: data sets of the Hugging Face hub.

Rows are read in Arrow batches from files that are mapped into memory, so that a corpus may be larger than it. Loading
scripts are not supported: ``datasets`` itself refuses them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kncompress import hub
from kncompress.data.prose import row_documents
from kncompress.data.row_files import COLUMN, no_column, text_of
from kncompress.data.split import held_out_shares, place
from kncompress.errors import UserError
from kncompress.terminal import first_line

HUB = "hub:"
SPLITS = {"train": {"train", "training"}, "validation": {"valid", "validation", "val", "dev"}, "test": {"test"}}
"""Our name of a split -> the names that files and data sets have for it."""
_ROWS_AT_ONCE = 1000
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class RowSource:
    """A data set of the hub: ``name`` is what the user wrote, ``path`` its id."""

    name: str
    key: str
    path: str
    configuration: str | None = None
    text_format: str = "auto"
    column: str | None = None

    @property
    def has_splits(self) -> bool:
        """Whether the data set itself says what is test."""
        return "test" in self._tables()

    def documents(self, split: str, held_out: Sequence[str] = ("validation", "test"), seed: int = 0) -> Iterator[str]:
        """Documents of ``split`` (or ``all``) as published; a held-out split that was not is hashed out of train."""
        tables = self._tables()
        if split == "all":
            for table in tables.values():
                yield from self._read(table)
        elif split in tables and split != "train":
            yield from self._read(tables[split])
        elif "train" in tables:
            unpublished = [name for name in held_out if name not in tables]
            shares = held_out_shares(self.size("train"))
            for document in self._read(tables["train"]):
                if not unpublished or place(document, unpublished, seed, shares) == split:
                    yield document

    @property
    def is_wikitext(self) -> bool:
        """Whether it is WikiText, as its name says."""
        return self._format() == "wikitext"

    def carves(self, held_out: Sequence[str]) -> bool:
        """Whether a split of ``held_out`` is taken out of its training text."""
        return any(split not in self._tables() for split in held_out)

    def size(self, split: str) -> int:
        """About the bytes that ``documents`` goes through."""
        tables = self._tables()
        read = tables.values() if split == "all" else [tables.get(split, tables.get("train"))]
        return sum(table.data.nbytes for table in read if table is not None)

    def share(self, split: str, held_out: Sequence[str]) -> float:
        """About the part of what is gone through that belongs to ``split``."""
        tables = self._tables()
        if split == "all" or (split in tables and split != "train"):
            return 1.0
        unpublished = [name for name in held_out if name not in tables]
        shares = held_out_shares(self.size("train"))
        return shares[split] if split in unpublished else 1.0 - sum(shares[name] for name in unpublished)

    def fingerprint(self) -> str:
        """Changes with the revision, configuration and files of the data set; nothing is read for it."""
        tables = [f"{split}={_identity(table)}" for split, table in self._tables().items()]
        return f"rows:{self._format()}:{self._column}:{';'.join(tables)}"

    def check(self) -> None:
        """Raises UserError where the data set is neither in the local cache nor within reach; loads nothing."""
        if _cached(self.path, self.configuration) is None:
            _require_hub(self)

    def published(self) -> dict[str, Any]:
        """Every split under its own name, as ``datasets.Dataset``; its columns are for the caller to check."""
        return _load(self)

    def _format(self) -> str:
        if self.text_format != "auto":
            return self.text_format
        return "wikitext" if Path(self.path).name.lower() == "wikitext" else "plain"

    @property
    def _column(self) -> str:
        return self.column or COLUMN

    def _read(self, table: Any) -> Iterator[str]:
        return row_documents(_texts(table, self._column, f"{self.key}={self.name}"), self._format())

    def _tables(self) -> dict[str, Any]:
        """Our split -> ``datasets.Dataset``, memory-mapped."""
        loaded = _load(self)
        found = {ours: loaded[name] for ours, names in SPLITS.items() for name in loaded if name in names}
        if not found:
            raise UserError(f"{self.key}={self.name}: no split train, validation or test; it has {', '.join(loaded)}")
        for table in found.values():
            if self._column not in table.column_names:
                raise no_column(f"{self.key}={self.name}", self._column, table.column_names)
        return found


def hub_source(entry: str, key: str, text_format: str = "auto", column: str | None = None) -> RowSource:
    """``hub:ID`` or ``hub:ID:CONFIGURATION`` as a source. Raises UserError for anything else, or with no hub."""
    text = entry.removeprefix(HUB)
    if not _ID.fullmatch(text):
        raise UserError(
            f"{key}={entry}: not hub:ID or hub:ID:CONFIGURATION, e.g. hub:Salesforce/wikitext:wikitext-2-v1"
        )
    path, _, configuration = text.partition(":")
    source = RowSource(entry, key, path, configuration or None, text_format, column)
    source.check()
    return source


def _identity(table: Any) -> str:
    """Configuration, version, revision and file names, which are the end of the paths in the cache."""
    paths = [Path(file["filename"]).parts[-4:] for file in table.cache_files]
    return str(paths) if paths else str(table._fingerprint)


def _texts(table: Any, column: str, where: str) -> Iterator[str]:
    number = 0
    for batch in table.with_format("arrow").iter(_ROWS_AT_ONCE):
        for value in batch[column].to_pylist():
            number += 1
            yield text_of(value, f"{where}: row {number}", column)


@lru_cache(maxsize=8)
def _load(source: RowSource) -> dict[str, Any]:
    """The splits of a data set; downloaded at the first call on a machine."""
    import datasets

    cached = _cached(source.path, source.configuration) is not None
    if not cached:
        _require_hub(source)
    try:
        with _without_network(cached):
            options: dict[str, Any] = {"cache_dir": str(_cache_folder())}
            return dict(datasets.load_dataset(source.path, source.configuration, **options))
    except Exception as error:  # datasets has no common error for what can be wrong with a repository
        raise UserError(f"{source.key}={source.name}: cannot be loaded ({first_line(error)})") from error


def _require_hub(source: RowSource) -> None:
    offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    instead = f"{source.key}=<file or folder>"
    hub.require(f"{source.key}={source.name}", _cache_folder(), instead, "HF_DATASETS_OFFLINE" if offline else "")


@contextmanager
def _without_network(wanted: bool) -> Iterator[None]:
    """Makes ``datasets`` take what is in its cache, as HF_DATASETS_OFFLINE=1 does, and say nothing about it."""
    import datasets

    before, level = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    if wanted:
        datasets.config.HF_HUB_OFFLINE = True
        datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)


def _cache_folder() -> Path:
    """Where ``datasets`` keeps its Arrow files; found without importing it, which takes a second."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def _cached(path: str, configuration: str | None = None) -> Path | None:
    """A folder of Arrow files in the cache (``org___name/configuration/version/hash``), or None."""
    *owner, name = path.split("/")
    folder = _cache_folder() / "___".join([*owner, _snake_case(name)])
    found = [
        file
        for file in sorted(folder.glob(f"{configuration or '*'}/*/*/dataset_info.json"))
        if not file.parent.name.endswith(".incomplete")
    ]
    return found[-1].parent if found else None


def _snake_case(name: str) -> str:
    """``OpenWebText`` -> ``open_web_text``, as ``datasets`` names the folders of its cache."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()
