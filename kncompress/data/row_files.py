"""Files of rows (JSON, CSV, Parquet, Arrow): their texts, one a row, read as they are taken.

A broken row is refused, with file, row number and reason. A value that is no text (a list, bytes) is never turned
into text.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from kncompress.data.files import LONGEST_LINE, TextFile
from kncompress.errors import UserError

COLUMN = "text"
"""Column of the text where ``data.column`` names none."""
_DELIMITERS = {".csv": ",;|\t", ".tsv": "\t,;|"}
_AT_ONCE = 1000
"""Rows of a Parquet file that are in memory at a time."""
_SPACE: Any = re.compile(r"\s*")
_HALF = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder()


def row_texts(file: TextFile, key: str, column: str | None = None) -> Iterator[str]:
    """The text of every row; blank ones too.

    Args:
        file: one that holds rows.
        key: what errors name, ``data.source`` say.
        column: where the text is; null: ``text``.

    Raises:
        UserError: no such column, or a row that cannot be read or holds something other than text.
    """
    where, name = f"{key}={file.path}", column or COLUMN
    if file.rows in ("parquet", "arrow"):
        yield from _table_texts(file, where, name)
        return
    with file.open(key, newline="" if file.rows == "csv" else None) as stream:
        if file.rows == "csv":
            yield from _csv_texts(stream, file, where, name)
            return
        rows = _array(stream, where) if file.rows == "json" else _lines(stream, where)
        for number, row in rows:
            if isinstance(row, dict) and name not in row:
                raise no_column(where if number == 1 else f"{where}: row {number}", name, row)
            yield text_of(row[name] if isinstance(row, dict) else row, f"{where}: row {number}", name)


def no_column(where: str, name: str, columns: Iterable[Any]) -> UserError:
    """The error for a column that is not there."""
    found = [str(one) for one in columns]
    told = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return UserError(
        f"{where}: no column {name}; it has {told or 'none'}; data.column=... names the column of the text"
    )


def text_of(value: Any, where: str, name: str) -> str:
    """``value`` where it is a text, nothing for null. Raises UserError for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        if not value.isascii() and _HALF.search(value):
            raise UserError(
                f"{where}: column {name} has half a surrogate pair (\\ud800-\\udfff), which is no character"
            )
        return value
    raise UserError(f"{where}: column {name} holds {_kind(value)}, not text")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bytes: "bytes", bool: "true or false"}
    return next((told for kind, told in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _lines(stream: IO[str], where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: row {number}: not JSON ({error})") from None
            yield number, row


def _array(stream: IO[str], where: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, decoded one by one: the array is never in memory as a whole."""
    text = stream.read(LONGEST_LINE)
    done, number = _SPACE.match(text).end() + 1, 0  # behind the bracket
    while True:
        try:
            found, end = _element(text, done, first=number == 0)
        except ValueError as error:
            more = stream.read(max(LONGEST_LINE, len(text) - done))
            if not more:
                raise UserError(f"{where}: row {number + 1}: not JSON ({error})") from None
            text, done = text[done:] + more, 0
            continue
        except RecursionError as error:
            raise UserError(f"{where}: row {number + 1}: not JSON ({error})") from None
        if not found:
            return
        number, done = number + 1, end
        yield number, found[0]


def _element(text: str, place: int, first: bool) -> tuple[list[Any], int]:
    """The element of an array behind ``place`` and where it ends; nothing at the array's end."""
    place = _SPACE.match(text, place).end()
    if text.startswith("]", place):
        return [], place
    if not first:
        if not text.startswith(",", place):
            raise ValueError("a comma or the closing bracket is missing")
        place = _SPACE.match(text, place + 1).end()
    value, end = _DECODER.raw_decode(text, place)
    return [value], end


def _csv_texts(stream: IO[str], file: TextFile, where: str, name: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # its own limit, 128 KiB, is shorter than a document
    first = stream.readline()
    stream.seek(0)
    given = _DELIMITERS.get(file.ending, ",;|\t")
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in given}
    mark = next((mark for mark in given if name in headers[mark]), given[0])
    rows = csv.reader(stream, delimiter=mark, strict=True)
    try:
        columns = next(rows, [])
        if name not in columns:
            raise no_column(where, name, columns)
        place = columns.index(name)
        for number, row in enumerate(rows, start=1):
            if not row:
                continue
            if len(row) != len(columns):
                raise UserError(f"{where}: row {number}: {len(row)} columns, not {len(columns)} as in the first line")
            yield row[place]
    except csv.Error as error:
        raise UserError(f"{where}: line {rows.line_num}: not a row of a table ({error})") from None


def _table_texts(file: TextFile, where: str, name: str) -> Iterator[str]:
    import pyarrow

    try:
        schema, batches = _parquet(file) if file.rows == "parquet" else _arrow(file)
        if name not in schema.names:
            raise no_column(where, name, schema.names)
        number = 0
        for batch in batches(name):
            for value in batch.column(name).to_pylist():
                number += 1
                yield text_of(value, f"{where}: row {number}", name)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: cannot be read as {file.rows} ({reason})") from None


def _parquet(file: TextFile) -> tuple[Any, Any]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file.path)
    return table.schema_arrow, lambda name: table.iter_batches(_AT_ONCE, columns=[name])


def _arrow(file: TextFile) -> tuple[Any, Any]:
    """Arrow's file format, or the stream that ``datasets`` writes; mapped into memory."""
    import pyarrow

    stored = pyarrow.memory_map(str(file.path))
    try:
        table = pyarrow.ipc.open_file(stored)
        return table.schema, lambda name: map(table.get_batch, range(table.num_record_batches))
    except pyarrow.ArrowInvalid:
        stored.seek(0)
        stream = pyarrow.ipc.open_stream(stored)
        return stream.schema, lambda name: iter(stream)
