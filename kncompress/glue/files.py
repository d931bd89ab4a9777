"""The tab-separated files of the official GLUE download: no quoting, and headers that differ from task to task."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kncompress.errors import UserError
from kncompress.glue.tasks import HIGHEST, LOWEST, GlueTask

_HEAD = 65_536
"""Bytes at the beginning of a file that tell how its lines end."""


class Example(NamedTuple):
    """One sentence or two, and the label: a number from 0, a score, or None in a test set."""

    texts: tuple[str, ...]
    label: int | float | None


def read_examples(task: GlueTask, file: Path, source: str, labelled: bool = True) -> Iterator[Example]:
    """The examples of a training or dev file or, with ``labelled`` false, of a test file.

    ``source`` is what errors name as ``data.source``. A ``"`` is a character like any other; a byte order mark at the
    beginning (MRPC) and the carriage return of a row's end are dropped.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, lacks a column, or a row has the wrong number of columns or
            a label outside the task; names the file and line.
    """
    wanted = (*task.texts, task.label) if labelled else task.texts
    bare = task.bare_columns if labelled else ()
    count = 0
    for number, row in _rows(file, wanted, bare, source, task.skips_broken_rows):
        count += 1
        label = parse_label(task, row[-1], f"data.source={source}: {_short(file)}, line {number}") if labelled else None
        yield Example(row[: len(task.texts)], label)
    if not count:
        raise UserError(f"data.source={source}: {_short(file)}: no examples in it")


def parse_label(task: GlueTask, text: str, where: str) -> int | float:
    """Number of a label as the files write it, or the score. Raises UserError that begins with ``where``."""
    if task.is_regression:
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not LOWEST <= score <= HIGHEST:
            raise UserError(f"{where}: {task.label}={text}: must be a number from {LOWEST:g} to {HIGHEST:g}")
        return score
    if text not in task.codes:
        raise UserError(f"{where}: {task.label}={text}: not one of {', '.join(task.codes)}")
    return task.codes.index(text)


def _rows(
    file: Path, wanted: Sequence[str], bare: Sequence[str], source: str, skip: bool
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, the wanted columns) of every row; ``bare`` are the columns of a file without header."""
    lines = _lines(file, source)
    columns = list(bare) or next(lines, (0, ""))[1].split("\t")
    for name in wanted:
        if name not in columns:
            found = ", ".join(column[:20] for column in columns[:8]) if any(columns) else "nothing"
            more = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
            raise UserError(f"data.source={source}: {_short(file)}: no column {name}; it has {found}{more}")
    places = [columns.index(name) for name in wanted]
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) == len(columns):
            yield number, tuple(cells[place] for place in places)
        elif not skip:
            raise UserError(
                f"data.source={source}: {_short(file)}, line {number}: {len(cells)} columns, not {len(columns)}"
            )


def _lines(file: Path, source: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty without their ends, counted from 1.

    Only a line feed ends one, for the texts hold other ends; only a carriage return in a file of an old Mac, which has
    no line feed.
    """
    try:
        with file.open("rb") as start:
            head = start.read(_HEAD)
        end = "\r" if b"\r" in head and b"\n" not in head else "\n"
        with file.open(encoding="utf-8-sig", newline=end) as stream:
            for number, line in enumerate(stream, 1):
                if text := line.removesuffix("\n").removesuffix("\r"):
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"data.source={source}: {_short(file)}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"data.source={source}: {_short(file)}: cannot be read ({error.strerror})") from error


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
