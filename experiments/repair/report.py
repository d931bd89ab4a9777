"""Collect the runs of ``run.sh`` into ``results.csv`` and ``curves.svg`` beside this file, and print a table.

Usage: python experiments/repair/report.py RUNS; the picture needs matplotlib (extra ``reports``).
"""

import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BATCH = 4096
"""Tokens of a step of the experiment."""
FULL = {
    "full_kngpt2-nearest": "KnGPT2's shapes, nearest factors (the paper's start)",
    "full_kngpt2-calibrated-symmetries-repair": "the same shapes, fitted to the inputs (the demo)",
    "full_planner-sequential": "the planner's shapes, sequential fit",
}
COLUMNS = ("parameters/student", "perplexity/start", "perplexity/student", "kl/start", "kl/student", "wall_seconds")


def main(folder: Path) -> None:
    """Write the file and print the table, best end first."""
    rows = []
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        if result["verb"] == "train" and result["status"] == "finished":
            values = result["metrics"] | json.loads((file.parent / "run.json").read_text())
            plan = folder / f"{file.parent.name.split('-')[0]}-plan" / "result.json"
            predicted = json.loads(plan.read_text())["metrics"]["kl/predicted"] if plan.exists() else None
            rows.append([file.parent.name, predicted, *(values[column] for column in COLUMNS)])
    rows.sort(key=lambda row: row[5])
    header = ["run", "kl/predicted", *COLUMNS]
    cells = [[_cell(value) for value in row] for row in rows]
    with (HERE / "results.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *cells])
    draw(folder)
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in cells:
        print("| " + " | ".join(row) + " |")


def draw(folder: Path) -> None:
    """Validation perplexity against training tokens of the runs over the whole text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in FULL.items():
        if (file := folder / name / "metrics.csv").exists():
            tokens, values = curve(file)
            axes.plot([count / 1000 for count in tokens], values, marker=".", label=label)
    axes.set(xlabel="training tokens (thousands)", ylabel="validation perplexity", yscale="log")
    ticks = [100, 120, 150, 200, 300, 500]
    axes.set_ylim(90, 520)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


def curve(file: Path) -> tuple[list[float], list[float]]:
    """Training tokens and validation perplexity. Steps in the file count from 0."""
    found = []
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row.get("validation/perplexity"):
                found.append(((int(row["step"]) + 1) * BATCH, float(row["validation/perplexity"])))
    return [tokens for tokens, _ in found], [value for _, value in found]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
