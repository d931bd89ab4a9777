"""What a person sees while a text is tokenised: a bar on a terminal, a line now and then in a log."""

import time
from typing import TextIO

from kncompress.data.sources import Reading
from kncompress.terminal import Progress, clock

_MEGABYTE = 1e6


class TokenisingProgress:
    """Share, rate and time left of a ``Reading``, on ``stream`` (standard error)."""

    def __init__(self, label: str, reading: Reading, stream: TextIO | None = None) -> None:
        self.reading, self._progress = reading, Progress(label, stream=stream)
        self._began, self._skipped = time.monotonic(), 0

    def skipped(self) -> None:
        """What has been read so far was tokenised by an earlier process: it does not count as done by this one."""
        self._skipped, self._began = self.reading.done, time.monotonic()

    def show(self, documents: int) -> None:
        """Shows the state where something is due; ``documents`` counts those that are tokenised."""
        if self._progress.due:
            self._progress.show(self._part(), self._text(documents))

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._progress.close()

    def _part(self) -> float:
        return min(1.0, self.reading.done / self.reading.total) if self.reading.total else 0.0

    def _text(self, documents: int) -> str:
        done, total = self.reading.done / _MEGABYTE, max(self.reading.total, self.reading.done) / _MEGABYTE
        rate = (self.reading.done - self._skipped) / _MEGABYTE / max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self._part():.0%}", f"{done:,.0f} of {total:,.0f} MB", f"{documents:,} documents"]
        if rate > 0:
            parts += [f"{rate:.1f} MB/s", f"{clock((total - done) / rate)} left"]
        return "  ".join(parts)
