"""The table of a sweep: ``sweep.csv``, written again after every job, and its printed form."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kncompress.tracking.whole_file import write_text

_SHOWN = 6
_LAST = ("exit_code", "error")
_FIRST = ("perplexity", "glue/average", "loss", "parameters", "error")


def sweep_rows(sweep_dir: Path, jobs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One row a job: number, status, what differs between jobs, the metrics of ``result.json``, the error."""
    varied = _varied(jobs)
    rows = []
    for number, words in enumerate(jobs):
        result = _result(sweep_dir / str(number))
        given = dict(word.partition("=")[::2] for word in words)
        row: dict[str, Any] = {"job": number, "status": result.get("status", "pending")}
        row |= {key: given.get(key, "") for key in varied}
        row |= {key: value for key, value in (result.get("metrics") or {}).items() if key not in row}
        row |= {"exit_code": result.get("exit_code", ""), "error": result.get("error", "")}
        rows.append(row)
    return rows


def write_sweep_table(sweep_dir: Path, jobs: Sequence[Sequence[str]]) -> None:
    """Write ``sweep.csv`` in ``sweep_dir`` from the jobs' folders: there whole or not at all."""
    rows = sweep_rows(sweep_dir, jobs)
    columns = [*dict.fromkeys(key for row in rows for key in row if key not in _LAST), *_LAST]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(sweep_dir / "sweep.csv", text.getvalue())


def sweep_table(sweep_dir: Path, jobs: Sequence[Sequence[str]]) -> str:
    """The rows as text for the terminal, with the main metrics alone (``sweep.csv`` has all)."""
    rows = sweep_rows(sweep_dir, jobs)
    fixed = ["job", *_varied(jobs), "status"]
    metrics = dict.fromkeys(key for row in rows for key in row if key not in (*fixed, *_LAST))
    ranked = sorted(metrics, key=lambda name: next((i for i, w in enumerate(_FIRST) if w in name), len(_FIRST)))
    columns = [*fixed, *ranked[:_SHOWN]]
    cells = [columns] + [[_cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _varied(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose word differs between jobs, in order; all keys where the sweep has one job."""
    common = set.intersection(*(set(words) for words in jobs)) if len(jobs) > 1 else set()
    return list(dict.fromkeys(word.partition("=")[0] for words in jobs for word in words if word not in common))


def _result(folder: Path) -> dict[str, Any]:
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "running"} if folder.exists() else {}
    return result if isinstance(result, dict) else {}


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
