"""The table at the end of a run: the teacher, the student at the start, and the student after training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from kncompress.runs.whole_file import write_text
from kncompress.terminal import plain, show, table

ABSENT = "-"


@dataclass(frozen=True)
class ModelScores:
    """One row: what was measured of one model; None where it was not."""

    name: str
    parameters: int | None = None
    """Unique parameters of the whole model, tied ones once."""
    perplexity: float | None = None
    kl: float | None = None
    """Mean KL(teacher || model) of the next-token distributions, nats per token."""
    bits_per_byte: float | None = None
    """Cross-entropy in bits per byte of text."""
    same_top: float | None = None
    """Tokens where the teacher has the same likeliest token, in percent."""


def gap_closed(teacher: ModelScores, start: ModelScores, student: ModelScores) -> float | None:
    """Return the share of the gap in log-perplexity to the teacher that training has closed.

    ``(ln p_start - ln p_student) / (ln p_start - ln p_teacher)``: 0 at the start, 1 at the teacher, negative
    where training did harm. None where a perplexity is missing or not finite, or where the start was no worse
    than the teacher, so that there is no gap to close.
    """
    values = [scores.perplexity for scores in (teacher, start, student)]
    if any(value is None or not math.isfinite(value) or value <= 0 for value in values):
        return None
    of_teacher, of_start, of_student = (math.log(value) for value in values if value is not None)
    if of_start <= of_teacher:
        return None
    return (of_start - of_student) / (of_start - of_teacher)


def comparison_table(rows: Sequence[ModelScores]) -> Table:
    """Return a table of ``rows``, figures to the right, a column left out where no row has a value.

    Shares of the parameters are relative to the first row; KL is that to the teacher, in nats per token.
    """
    columns = {
        "parameters": [_figure(row.parameters, 0) for row in rows],
        "share": [_share(row.parameters, rows[0].parameters) for row in rows],
        "perplexity": [_figure(row.perplexity, 2) for row in rows],
        "KL": [_figure(row.kl, 4) for row in rows],
        "agree": [ABSENT if row.same_top is None else f"{row.same_top:.1f}%" for row in rows],
        "bits/byte": [_figure(row.bits_per_byte, 4) for row in rows],
    }
    kept = {title: cells for title, cells in columns.items() if any(cell != ABSENT for cell in cells)}
    lines = [(row.name, *(cells[number] for cells in kept.values())) for number, row in enumerate(rows)]
    return table(("model", *kept), lines, "<" + ">" * len(kept), ruled=True)


def write_summary(
    folder: Path,
    teacher: ModelScores | None,
    start: ModelScores | None,
    student: ModelScores,
    console: Console | None = None,
    further: Sequence[ModelScores] = (),
) -> str:
    """Print the comparison to ``console`` (standard output) and write it as plain text to ``summary.txt``.

    ``further`` are rows of another text.

    Returns:
        The text written. Without a teacher or a start it has no line about the gap.
    """
    rows = [scores for scores in (teacher, start, student, *further) if scores is not None]
    parts: list[RenderableType] = [comparison_table(rows)]
    if teacher is not None and start is not None:
        parts.append(_gap_line(gap_closed(teacher, start, student)))
    show(*parts, console=console)
    text = "".join(f"{line}\n" for line in plain(*parts).splitlines() if line)
    write_text(folder / "summary.txt", text)
    return text


def _gap_line(share: float | None) -> str:
    if share is None:
        return "share of the log-perplexity gap to the teacher closed: none to close, or not measurable"
    return f"share of the log-perplexity gap to the teacher closed: {share:.1%}"


def _figure(value: float | None, decimals: int) -> str:
    return ABSENT if value is None else f"{value:,.{decimals}f}"


def _share(value: int | None, whole: int | None) -> str:
    return f"{value / whole:.1%}" if value is not None and whole else ABSENT
