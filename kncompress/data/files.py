"""What a file is, by its name and by its content, and how it is opened: the one place that decides it.

A file holds running text or rows (JSON, CSV, Parquet, Arrow), perhaps packed by gzip, bzip2 or xz. Anything else (an
archive, a picture, a page of markup) is refused, and the error says what it is.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from kncompress.errors import UserError
from kncompress.runs.process import tell

PROSE = (".txt", ".text", ".md", ".tokens", ".raw")
ROWS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Ending of a name -> what the rows are written in."""
LONGEST_LINE = 2**20
"""Characters after which a line is passed on unfinished."""
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_PACKED_ENDINGS = (".gz", ".bz2", ".xz")
_UNPACKED, _UNPACKED_PARQUET = 4, 2
"""Bytes of English text in one packed byte, about."""
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_REFUSED = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"%PDF": "a PDF; extract its text first",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; git lfs pull brings that",
}
_MARKUP = ("<!doctype html", "<html", "<?xml", "<mediawiki")
_ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks, which editors on Windows write, and the encoding that drops them."""
_HEAD = 4096
# What ``datasets`` writes beside the files of a data set.
_ABOUT_A_DATA_SET = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")


@dataclass(frozen=True)
class TextFile:
    """A file that can be read."""

    path: Path
    rows: str | None
    """``jsonl``, ``json``, ``csv``, ``parquet`` or ``arrow``; None: running text."""
    packed: bool = False
    encoding: str = "utf-8"
    ending: str = ""
    """The ending of its name in small letters, without that of the packing."""

    @property
    def size(self) -> int:
        """Bytes, unpacked (of a packed file about)."""
        times = _UNPACKED if self.packed else _UNPACKED_PARQUET if self.rows == "parquet" else 1
        return self.path.stat().st_size * times

    @contextmanager
    def open(self, key: str, newline: str | None = None) -> Iterator[IO[str]]:
        """Its text, unpacked. Raises UserError, inside the context too, where its bytes cannot be read as that."""
        where = f"{key}={self.path}"
        try:
            with _opener(self.path)(self.path, "rt", encoding=self.encoding, newline=newline) as stream:
                yield stream
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text{self._first_bad_byte()}; convert it, by iconv say") from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
            raise UserError(f"{where}: its packing is damaged, or its end is missing") from None
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None

    def _first_bad_byte(self) -> str:
        """`` (byte N)``: the decoder of a stream only knows the position within its buffer."""
        if not self.encoding.startswith("utf-8"):
            return ""
        position = 0
        with _opener(self.path)(self.path, "rb") as stream:
            for line in stream:
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return f" (byte {position + error.start})"
                position += len(line)
        return ""


def text_file(path: Path, key: str = "data.source") -> TextFile:
    """What ``path`` is. Raises UserError where it is nothing that can be read as text, with what it is instead."""
    where = f"{key}={path}"
    try:
        facts = path.stat()
        return _text_file(path, facts.st_size, facts.st_mtime_ns)
    except _NoText as error:
        raise UserError(f"{where}: {error}") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise UserError(f"{where}: its packing is damaged, or its end is missing") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None


class _NoText(Exception):
    """What a file is that cannot be read as text."""


@lru_cache(maxsize=4096)
def _text_file(path: Path, size: int, modified: int) -> TextFile:
    packed = _opener(path) is not open
    with _opener(path)(path, "rb") as stream:
        head = stream.read(_HEAD)
    names = [ending.lower() for ending in path.suffixes]
    ending = next((name for name in reversed(names) if name not in _PACKED_ENDINGS), "")
    for start, kind in _TABLES.items():
        if head.startswith(start):
            if packed:
                raise _NoText(f"a packed {kind} file; unpack it first")
            return TextFile(path, kind, False, ending=ending)
    rows = ROWS.get(ending)
    if rows == "parquet" or (rows == "arrow" and not head.startswith(b"\xff\xff\xff\xff")):
        raise _NoText(f"no {rows} file")
    if rows == "arrow":
        return TextFile(path, rows, False, ending=ending)
    for start, what in _REFUSED.items():
        if head.startswith(start):
            raise _NoText(what)
    if head[257:262] == b"ustar":
        raise _NoText("a tar archive; unpack it first")
    encoding = next((found for mark, found in _ENCODINGS.items() if head.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\x00" in head:
        raise _NoText("not text: it has bytes of 0")
    start = head.decode(encoding, errors="replace").lstrip()
    if start.lower().startswith(_MARKUP):
        raise _NoText("a page of HTML or XML; extract its text first")
    if rows in (None, "json", "jsonl"):
        rows = _json_kind(start, rows is not None)
    return TextFile(path, rows, packed, encoding, ending)


def _json_kind(start: str, named: bool) -> str | None:
    """``json`` for an array, ``jsonl`` for an object a line, None for what is no JSON; by the first line alone."""
    line, end, _ = start.partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if named:  # a long first line may not be whole
            if line.strip() == "{":
                raise _NoText("one JSON object, not rows: give an object a line, or an array of them") from None
            return "json" if start.startswith("[") else "jsonl"
        cut = not end and len(start) > _HEAD // 4
        return "jsonl" if cut and start.startswith('{"') else "json" if cut and start.startswith('[{"') else None
    if isinstance(value, dict):
        return "jsonl"
    return "json" if isinstance(value, list) and (named or (value and isinstance(value[0], dict))) else None


def _opener(path: Path) -> Any:
    """What opens a file so that its bytes are unpacked: its own first bytes tell it, whatever its name says."""
    with path.open("rb") as stream:
        head = stream.read(6)
    return next((opener for mark, opener in _PACKED.items() if head.startswith(mark)), open)


def text_lines(file: Path, key: str = "data.source") -> Iterator[str]:
    """The lines of a file with their ends, which become ``\\n``. Raises UserError where it is not UTF-8."""
    with text_file(file, key).open(key) as stream:
        while line := stream.readline(LONGEST_LINE):
            yield line


def in_folder(folder: Path, key: str, column: str = "text") -> list[TextFile]:
    """The files of text and rows below ``folder``, in the order of their names; once a process, what is left out.

    Hidden files and folders are never read (an editor's copies are there), nor a .json of one object without
    ``column`` (a tokenizer, settings). Where there are rows, Markdown is not: the card of a data set is no text of it.

    Raises UserError where there is none, or a file that should be one cannot be read.
    """
    every = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    named = {path: _ending(path) for path in every if path.name not in _ABOUT_A_DATA_SET}
    has_rows = any(ending in ROWS for ending in named.values())
    chosen = [p for p, e in named.items() if e in ROWS or (e in PROSE and not (has_rows and e == ".md"))]
    found = []
    for path in [path for path in chosen if path.stat().st_size]:
        try:
            file = text_file(path, key)
        except UserError:
            if named[path] != ".json":  # which may be anything: settings, say
                raise
            chosen.remove(path)
        else:
            if named[path] == ".json" and _is_one_object(file, key, column):
                chosen.remove(path)
            else:
                found.append(file)
    if not found:
        endings = ", ".join((*PROSE, *ROWS))
        raise UserError(f"{key}={folder}: the folder holds no text file ({endings})")
    left_out = [path for path in every if path not in chosen and path.name not in _ABOUT_A_DATA_SET]
    if left_out:
        kinds = Counter(file.ending or "no ending" for file in found)
        read = ", ".join(f"{count} {ending}" for ending, count in kinds.items())
        names = ", ".join(path.relative_to(folder).as_posix() for path in left_out[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        tell(f"{key}={folder}: reads {len(found)} files ({read}), leaves out {names}{more}")
    return found


def _is_one_object(file: TextFile, key: str, column: str) -> bool:
    """Whether a file named .json holds one object that is no row."""
    if file.rows != "jsonl":
        return False
    with file.open(key) as stream:
        line = stream.readline()
        if stream.read(_HEAD).strip():
            return False
    with suppress(ValueError, RecursionError):
        return column not in json.loads(line)
    return False


def _ending(path: Path) -> str:
    return next((e.lower() for e in reversed(path.suffixes) if e.lower() not in _PACKED_ENDINGS), "")


def content_hash(file: Path) -> str:
    """Hash of the bytes of a file; computed once a process for each state of it."""
    facts = file.stat()
    return _content_hash(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_hash(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
