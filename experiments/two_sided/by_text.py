"""Collect the runs of ``budgets.sh`` into a table of perplexities by text, and print it.

Usage: python experiments/two_sided/by_text.py RUNS TABLE.csv
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ("published", "prose", "web")
"""WikiText-2's raw test text as published and as prose; web pages that no fit has read."""


def read(file: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where it has not been made."""
    return json.loads(file.read_text()) if file.exists() else {}


def main(folder: Path, table: Path) -> None:
    """Write the file and print the table, the worst on the web's text first."""
    rows = []
    names = [run.name.removesuffix("-web") for run in folder.glob("*-web")]
    for name in names:
        scores = [read(folder / f"{name}-{text}" / "result.json").get("metrics", {}) for text in TEXTS]
        cost = read(folder / name / "run.json")
        plan = read(folder / f"plan_{name.rpartition('_')[2]}" / "run.json")
        row = [name, f"{scores[2]['parameters']:.0f}"]
        row += [f"{score['perplexity']:.2f}" if score else "" for score in scores]
        row += [f"{cost['wall_seconds']:.0f}" if cost else "", f"{cost['peak_memory_bytes'] / 1e9:.2f}" if cost else ""]
        rows.append([*row, f"{plan['wall_seconds']:.0f}" if plan else ""])
    rows.sort(key=lambda row: -float(row[4]))
    header = ["run", "parameters", *TEXTS, "seconds", "peak_gb", "plan_seconds"]
    with table.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
