"""The table of a sweep: ``sweep.csv`` and ``sweep.md``, written again after every job, and its printed form."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from kncompress.cli.sweep_folder import Sweep, read_sweep, result_of
from kncompress.reports.figures import pareto_front
from kncompress.runs.whole_file import write_text
from kncompress.terminal import markdown_table, text_table

_SHOWN = 6
_LAST = ("exit_code", "error")
_FIRST = ("perplexity", "glue/average", "loss", "parameters", "error")


def sweep_rows(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row a job of ``sweep.json``: number, status, what differs between jobs, the metrics of ``result.json``, the
    error; for a search also ``front``: yes where no other job is better in all that is minimised."""
    sweep = read_sweep(sweep_dir)
    if sweep is None:
        return []
    varied = _varied(sweep.job_words)
    rows = []
    for number, words in enumerate(sweep.job_words):
        result = result_of(sweep_dir / str(number))
        given = dict(word.partition("=")[::2] for word in words)
        row: dict[str, Any] = {"job": number, "status": result.get("status", "pending")}
        row |= {key: given.get(key, "") for key in varied}
        row |= {key: value for key, value in (result.get("metrics") or {}).items() if key not in row}
        row |= {"exit_code": result.get("exit_code", ""), "error": result.get("error", "")}
        rows.append(row)
    _mark_front(rows, sweep)
    return rows


def write_sweep_table(sweep_dir: Path) -> None:
    """Write ``sweep.csv`` and ``sweep.md`` in ``sweep_dir`` from the jobs' folders: there whole or not at all."""
    with FileLock(sweep_dir / ".table.lock"):  # jobs that end together: the later table has both
        rows = sweep_rows(sweep_dir)
        columns = [*dict.fromkeys(key for row in rows for key in row if key not in _LAST), *_LAST]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(sweep_dir / "sweep.csv", text.getvalue())
        shown = [*_main_columns(sweep_dir, rows), "error"]
        write_text(sweep_dir / "sweep.md", markdown_table(shown, _cells(rows, shown), "<" * len(shown)))


def sweep_table(sweep_dir: Path) -> str:
    """The rows as text for the terminal, with the main metrics alone (``sweep.csv`` has all)."""
    rows = sweep_rows(sweep_dir)
    shown = _main_columns(sweep_dir, rows)
    return text_table(shown, _cells(rows, shown), "<" * len(shown))


def _main_columns(sweep_dir: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    sweep = read_sweep(sweep_dir)
    assert sweep is not None
    fixed = ["job", *_varied(sweep.job_words), "status", *(["front"] if sweep.metrics else [])]
    metrics = dict.fromkeys(key for row in rows for key in row if key not in (*fixed, *_LAST))
    rank = [*sweep.metrics, *_FIRST]
    ranked = sorted(metrics, key=lambda name: next((i for i, word in enumerate(rank) if word in name), len(rank)))
    return [*fixed, *ranked[:_SHOWN]]


def _cells(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    return [[_cell(row.get(name, "")) for name in columns] for row in rows]


def _mark_front(rows: list[dict[str, Any]], sweep: Sweep) -> None:
    """Set ``front`` of a search's jobs."""
    values: dict[int, tuple[Any, ...]] = {}
    for row in rows if sweep.metrics else []:
        found = tuple(row.get(name) for name in sweep.metrics)
        row["front"] = ""
        if row["status"] == "finished" and all(isinstance(value, int | float) for value in found):
            values[row["job"]] = found
    jobs = list(values)
    for index in pareto_front(list(values.values())):
        rows[jobs[index]]["front"] = "yes"


def _varied(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose word differs between jobs, in order; all keys where the sweep has one job."""
    common = set.intersection(*(set(words) for words in jobs)) if len(jobs) > 1 else set()
    return list(dict.fromkeys(word.partition("=")[0] for words in jobs for word in words if word not in common))


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).splitlines())
