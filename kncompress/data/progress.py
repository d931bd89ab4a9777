"""What a person sees while a text is tokenised: a bar on a terminal, a line now and then in a log."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from kncompress.data.sources import Reading

QUIET_SECONDS = 1.5
"""A text that is done within this time shows nothing."""
LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""
_MEGABYTE = 1e6


class TokenisingProgress:
    """Share, rate and time left of a ``Reading``, on ``stream`` (standard error)."""

    def __init__(self, label: str, reading: Reading, stream: TextIO | None = None) -> None:
        self.label, self.reading, self.stream = label, reading, stream or sys.stderr
        self._began = self._shown = time.monotonic()
        self._skipped = 0
        self._bar: Progress | None = None

    def skipped(self) -> None:
        """What has been read so far was tokenised by an earlier process: it does not count as done by this one."""
        self._skipped, self._began = self.reading.done, time.monotonic()

    def show(self, documents: int) -> None:
        """Shows the state where something is due; ``documents`` counts those that are tokenised."""
        now = time.monotonic()
        if self.stream.isatty():
            if self._bar is None and now - self._shown >= QUIET_SECONDS:
                columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
                self._bar = Progress(*columns, console=Console(file=self.stream), transient=True)
                self._task = self._bar.add_task(self.label, total=1.0, text="")
                self._bar.start()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._part(), text=self._text(documents))
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            print(f"{self.label}  {self._text(documents)}", file=self.stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _part(self) -> float:
        return min(1.0, self.reading.done / self.reading.total) if self.reading.total else 0.0

    def _text(self, documents: int) -> str:
        done, total = self.reading.done / _MEGABYTE, max(self.reading.total, self.reading.done) / _MEGABYTE
        rate = (self.reading.done - self._skipped) / _MEGABYTE / max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self._part():.0%}", f"{done:,.0f} of {total:,.0f} MB", f"{documents:,} documents"]
        if rate > 0:
            minutes, seconds = divmod(round((total - done) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            parts += [f"{rate:.1f} MB/s", f"{hours}:{minutes:02}:{seconds:02} left"]
        return "  ".join(parts)
