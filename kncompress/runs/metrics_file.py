"""``metrics.csv``: one row a step, one column a metric, appended to as a run goes on."""

import csv
import re
from collections.abc import Mapping
from io import SEEK_END, SEEK_SET, StringIO
from pathlib import Path

from kncompress.errors import UserError
from kncompress.reading import Bounds, read_bytes, shown
from kncompress.runs.whole_file import write_text
from kncompress.terminal import first_line

METRICS = "metrics.csv"
_BOUNDS = Bounds(2**30, 0)
_STEP = re.compile(r"[0-9]{1,18}")


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


def complete_rows(path: Path, subject: str = "metrics.csv") -> list[dict[str, str]]:
    """Return the rows of ``path``; what a killed process left after the last line end is no row.

    Raises:
        UserError: begins with ``subject``; a row is damaged: names its line, the column and the value.
    """
    content = read_bytes(path, subject, _BOUNDS)
    where = f"{subject}: {path.name}"
    try:
        text = content[: content.rfind(b"\n") + 1].decode()
        lines = csv.reader(StringIO(text, newline=""), strict=True)
        columns = next(lines, [])
        if columns and ("step" not in columns or len(set(columns)) < len(columns)):
            raise UserError(f"{where}: line 1: {shown(columns)}: not names of columns, one of them step")
        return [_row(columns, cells, f"{where}: line {lines.line_num}") for cells in lines]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{where}: is damaged ({first_line(error)})") from None


def _row(columns: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(columns):
        raise UserError(f"{where}: has {len(cells)} columns, not {len(columns)}")
    row = dict(zip(columns, cells, strict=True))
    for name, text in row.items():
        known = _STEP.fullmatch(text) if name == "step" else text == "" or _is_number(text)
        if not known:
            raise UserError(f"{where}: {name}={shown(text)}: not a number")
    return row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
