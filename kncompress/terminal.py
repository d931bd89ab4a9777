"""What a person sees: tables, progress, the first line of an error. rich is imported by those that draw."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.table import Table

QUIET_SECONDS = 1.5
"""Work that is done within this time shows nothing."""
LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""
REFRESH_SECONDS = 0.25
"""Between two states of a bar."""
_ANY_WIDTH = 10_000


def first_line(error: object) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """The first line after the name of the error's class: ``ValueError: no such shape``."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def clock(seconds: float) -> str:
    """Return ``3:20`` or ``1:02:03`` for a number of seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str, ruled: bool = False) -> "Table":
    """Aligned columns, of which no cell is cut or broken.

    Args:
        head: names of the columns.
        rows: cells of each line; a short row leaves the columns after it empty.
        sides: ``<`` or ``>`` for each column: words to the left, figures to the right.
        ruled: a line under the names.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD if ruled else None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in zip(head, sides, strict=True):
        made.add_column(Text(name), justify="right" if side == ">" else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))  # no markup: a shape may be in brackets
    return made


def plain(*parts: "RenderableType") -> str:
    """Tables and lines as text for a file: no colour, as wide as they are, no blanks at the ends of lines."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=_ANY_WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """``table`` as text."""
    return plain(table(head, rows, sides))


def show(*parts: "RenderableType", console: "Console | None" = None) -> None:
    """Print on ``console`` (standard output). What is too wide for the terminal wraps; no figure is cut."""
    from rich.console import Console

    console = console or Console(highlight=False)
    free = console.options.update(width=_ANY_WIDTH)
    console.width = max([console.width, *(console.measure(part, options=free).maximum for part in parts)])
    for part in parts:
        console.print(part)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """A table of Markdown whose source is aligned too; arguments as ``table``. ``|`` would begin another cell."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)]
    padded = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (padded[0], rule, *padded[1:]))


class Progress:
    """A bar on a terminal, else a line now and then; on ``stream``, standard error.

    Args:
        label: what goes on, before the bar or the line.
        total: what ``done`` of ``show`` reaches at the end; None: not known.
        quiet: seconds that pass before a bar comes.
        lines: seconds between two lines where there is no terminal.
        kept: the bar stays on the terminal when it is done.
    """

    def __init__(
        self,
        label: str,
        total: float | None = 1.0,
        stream: TextIO | None = None,
        quiet: float = QUIET_SECONDS,
        lines: float | None = None,
        kept: bool = False,
    ) -> None:
        self.label, self.total, self.kept = label, total, kept
        self.stream = stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self._quiet, self._lines = quiet, LINE_SECONDS if lines is None else lines
        self._shown = time.monotonic()
        self._bar: Bar | None = None

    def begin(self, total: float | None) -> None:
        """Begin work of this total."""
        self.total, self._shown = total, time.monotonic()

    @property
    def waited(self) -> float:
        """Seconds since something was shown last."""
        return time.monotonic() - self._shown

    @property
    def due(self) -> bool:
        """Whether the next state is to be shown."""
        if not self.on_terminal:
            return self.waited >= self._lines
        return self.waited >= (self._quiet if self._bar is None else REFRESH_SECONDS)

    def show(self, done: float, text: str, line: str | None = None) -> None:
        """Show a state: ``done`` of the total and ``text``; without a terminal ``line``, or else label and text."""
        self._shown = time.monotonic()
        if not self.on_terminal:
            print(f"{self.label}  {text}" if line is None else line, file=self.stream, flush=True)
            return
        if self._bar is None:
            self._bar = self._new_bar()
        self._bar.update(self._bar.task_ids[0], completed=done, total=self.total, text=text)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _new_bar(self) -> "Bar":
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = TextColumn(self.label, markup=False), BarColumn(None), TextColumn("{task.fields[text]}", markup=False)
        bar = Bar(*columns, console=Console(file=self.stream), expand=True, transient=not self.kept)
        bar.add_task("", total=self.total, text="")
        bar.start()
        return bar

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Within the block these loggers of libraries tell of errors alone."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``tell(done, total)``, which shows how many of ``what`` are done; on a terminal alone."""
    with Progress(what, None, lines=float("inf")) as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total
            if progress.due:
                progress.show(done, f"{done:,} of {total:,}")

        yield tell


@contextmanager
def stages(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields ``tell(name)``, which says that the next of ``total`` stages begins, each of which may take a while."""
    with Progress(label, total, quiet=0.0) as progress:
        begun = 0

        def tell(name: str) -> None:
            nonlocal begun
            if progress.due:
                progress.show(begun, name)
            begun += 1

        yield tell
