"""Collect the runs of ``run.sh`` into ``results.csv`` beside this file, and print them as a table.

Usage: python experiments/two_sided/report.py RUNS
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = (
    "wikitext2",
    "web",
    "parameters",
    "share",
    "megabytes",
    "multiply_adds",
    "seconds",
    "peak_gb",
    "plan_seconds",
)


def read(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run; empty where it has not been made."""
    file = run / name
    return json.loads(file.read_text()) if file.exists() else {}


def row_of(folder: Path, name: str) -> dict[str, str]:
    """What was measured of one model."""
    made, cost = read(folder / name, "result.json").get("metrics", {}), read(folder / name, "run.json")
    # A model that no plan of this study made has none.
    plan = read(folder / f"{name.partition('-')[0]}-plan", "run.json")
    texts = {text: read(folder / f"{name}-{text}", "result.json")["metrics"] for text in COLUMNS[:2]}
    parameters = texts["web"]["parameters"]
    share = parameters / read(folder / "dense-web", "result.json")["metrics"]["parameters"]
    size = texts["web"].get("bytes", 2 * parameters)  # of a model that is not rounded in 16 bits
    adds = f"{made['multiply_adds/student'] / made['multiply_adds/teacher']:.3f}" if made else ""
    return {
        "wikitext2": f"{texts['wikitext2']['perplexity']:.2f}",
        "web": f"{texts['web']['perplexity']:.2f}",
        "parameters": f"{parameters:.0f}",
        "share": f"{share:.4f}",
        "megabytes": f"{size / 1e6:.1f}",
        "multiply_adds": adds,
        "seconds": f"{cost['wall_seconds']:.0f}" if cost else "",
        "peak_gb": f"{cost['peak_memory_bytes'] / 1e9:.2f}" if cost else "",
        "plan_seconds": f"{plan['wall_seconds']:.0f}" if plan else "",
    }


def main(folder: Path) -> None:
    """Write the file and print the table, the worst on the unseen text first."""
    names = [run.name.removesuffix("-web") for run in folder.glob("*-web") if (run / "result.json").exists()]
    rows = {name: row_of(folder, name) for name in names}
    order = sorted(names, key=lambda name: -float(rows[name]["web"]))
    table = [[name, *(rows[name][column] for column in COLUMNS)] for name in order]
    with (HERE / "results.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["run", *COLUMNS], *table])
    print(f"| run | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
