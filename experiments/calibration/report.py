"""Collect the runs of ``run.sh`` into ``results.csv`` beside this file, and print them as a table.

Usage: python experiments/calibration/report.py RUNS; runs that are not there are left out.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SHAPES = {
    "one_term": "one term, factor 2 on the hidden side",
    "two_by_two": "2x2, 2 terms",
    "four_by_four": "4x4, 8 terms",
    "outer_products": "209 outer products",
}
STARTS = ("nearest", "calibrated", "sequential")
COLUMNS = {
    "parameters/student": "parameters",
    "multiply_adds/student": "multiply-adds",
    "error/mean": "error",
    "error/weighted": "on inputs",
    "seconds/moments": "s moments",
    "seconds/fit": "s fit",
}


def metrics(run: Path) -> dict[str, float] | None:
    """Of a finished run; None where there is none."""
    file = run / "result.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return found["metrics"] if found["status"] == "finished" else None


def rows(folder: Path) -> list[dict[str, Any]]:
    """One for each pair of shape and start that was compressed and evaluated; the dense model first."""
    dense = metrics(folder / "dense-evaluated")
    found: list[dict[str, Any]] = []
    if dense is not None:
        found.append({"shape": "dense", "start": "", "parameters/student": dense["parameters"]} | _perplexity(dense))
    for shape in SHAPES:
        for start in STARTS:
            made, scored = metrics(folder / f"{shape}-{start}"), metrics(folder / f"{shape}-{start}-evaluated")
            if made is not None and scored is not None:
                values = {key: made[key] for key in COLUMNS if key in made}
                found.append({"shape": shape, "start": start} | values | _perplexity(scored))
    return found


def _perplexity(scored: dict[str, float]) -> dict[str, float]:
    return {"perplexity": scored["perplexity"]}


def main(folder: Path) -> None:
    """Write the file and print the table."""
    found = rows(folder)
    keys = ["shape", "start", *COLUMNS, "perplexity"]
    with (HERE / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(keys)
        for row in found:
            writer.writerow(f"{v:.6g}" if isinstance(v := row.get(key, ""), float) else v for key in keys)
    table = Table("shape", "start", *COLUMNS.values(), "perplexity")
    for row in found:
        table.add_row(SHAPES.get(row["shape"], row["shape"]), row["start"], *(_cell(row.get(k)) for k in keys[2:]))
    Console().print(table)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}" if value < 1e5 else f"{value:,.0f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
