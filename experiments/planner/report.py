"""Collect the runs of ``run.sh`` into ``results.csv`` beside this file, and print them as a table.

Usage: python experiments/planner/report.py RUNS
"""

import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = ("perplexity", "parameters", "share", "multiply_adds", "kl_predicted", "kl_measured", "seconds", "peak_gb")


def metrics_of(run: Path) -> dict[str, float]:
    """The metrics of a run; none where it has not been made."""
    file = run / "result.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else {}


def run_of(run: Path) -> dict[str, float]:
    """Its record; empty where it has not been made."""
    file = run / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def main(folder: Path) -> None:
    """Write the file and print the table."""
    rows = []
    for evaluated in sorted(folder.glob("*-evaluated"), key=lambda run: metrics_of(run).get("perplexity", 0.0)):
        name = evaluated.name.removesuffix("-evaluated")
        made, plan, scored = metrics_of(folder / name), metrics_of(folder / f"{name}-plan"), metrics_of(evaluated)
        share = made["parameters/student"] / made["parameters/teacher"] if made else 1.0
        adds = made["multiply_adds/student"] / made["multiply_adds/teacher"] if made else 1.0
        cost = run_of(folder / f"{name}-plan") or run_of(folder / name)
        values = {
            "perplexity": f"{scored['perplexity']:.2f}",
            "parameters": f"{scored['parameters']:.0f}",
            "share": f"{share:.4f}",
            "multiply_adds": f"{adds:.3f}",
            "kl_predicted": f"{plan['kl/predicted']:.4f}" if plan else "",
            "kl_measured": f"{plan['kl/measured']:.4f}" if "kl/measured" in plan else "",
            "seconds": f"{cost['wall_seconds']:.0f}" if cost else "",
            "peak_gb": f"{cost['peak_memory_bytes'] / 1e9:.2f}" if cost else "",
        }
        rows.append([name, *(values[column] for column in COLUMNS)])
    with (HERE / "results.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["run", *COLUMNS], *rows])
    print(f"| run | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
