"""``metrics.csv``: one row a step, one column a metric, appended to as a run goes on."""

import csv
from collections.abc import Mapping
from io import SEEK_END, SEEK_SET, StringIO
from pathlib import Path

from kncompress.runs.whole_file import write_text


class MetricsFile:
    """A CSV file that grows row by row and survives a kill, a resume and a new metric in a later row.

    Each row is on disk once :meth:`add` returns. Values of the same step, such as those of training and of
    the validation after it, share a row. A resumed run calls :meth:`rewind`, so that no step is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self._last: dict[str, str] = {}
        self._last_start = 0
        """Byte at which the last row starts: it is written anew when its step gets more values."""
        if path.is_file():
            self._rewrite(complete_rows(path))

    @property
    def last_step(self) -> int:
        """Step of the last row; 0 where there is none."""
        return int(self._last.get("step", 0))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write ``values`` into the row of ``step``, the last row or a new one."""
        row = {name: str(value) for name, value in values.items()} | {"step": str(step)}
        late = [name for name in row if name not in self.columns]
        same_step = self._last.get("step") == row["step"]
        if same_step:
            row = self._last | row
        if late:
            self.columns = ["step", *(name for name in [*self.columns, *late] if name != "step")]
            rows = complete_rows(self.path) if self.path.is_file() else []
            self._rewrite([*(rows[:-1] if same_step else rows), row])
            return
        with self.path.open("r+b") as file:
            file.seek(self._last_start if same_step else 0, SEEK_SET if same_step else SEEK_END)
            self._last, self._last_start = row, file.tell()
            file.write(self._lines([row]))
            file.truncate()

    def rewind(self, step: int) -> None:
        """Drop the rows of the steps after ``step``, which a run that resumes there will make again."""
        if self.path.is_file():
            self._rewrite([row for row in complete_rows(self.path) if int(row["step"]) <= step])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        if not self.columns and rows:
            self.columns = list(rows[0])
        text = self._lines([dict(zip(self.columns, self.columns, strict=True)), *rows[:-1]]) if self.columns else b""
        self._last_start = len(text)
        self._last = rows[-1] if rows else {}
        write_text(self.path, (text + self._lines(rows[-1:])).decode())

    def _lines(self, rows: list[dict[str, str]]) -> bytes:
        lines = StringIO(newline="")
        csv.DictWriter(lines, self.columns, restval="", lineterminator="\n").writerows(rows)
        return lines.getvalue().encode()


def complete_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of ``path``; what a killed process left after the last line end is no row."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(StringIO(text[: text.rfind("\n") + 1], newline="")))
