"""Collect the runs of ``run.sh`` into ``results.csv`` and ``curves.svg`` beside this file.

Usage: python experiments/objectives/report.py RUNS; the picture needs matplotlib (extra ``reports``).
"""

import csv
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
RUNS = {
    "ilkd": "factored, ILKD",
    "cross_entropy": "factored, cross-entropy",
    "dense": "dense control, cross-entropy",
}
COLUMNS = (
    "parameters/student", "tokens", "perplexity/teacher", "perplexity/start", "perplexity/student", "kl/start",
    "kl/student", "gap_closed",
)  # fmt: skip


def curve(run: Path) -> tuple[list[float], list[float]]:
    """Training tokens and validation perplexity. Steps in the file count from 0."""
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    step_tokens = metrics["tokens"] / metrics["steps"]
    with (run / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("validation/loss")]
    tokens = [(float(row["step"]) + 1) * step_tokens for row in rows]
    return tokens, [math.exp(float(row["validation/loss"])) for row in rows]


def main(folder: Path) -> None:
    """Write both files."""
    results = {name: json.loads((folder / name / "result.json").read_text())["metrics"] for name in RUNS}
    with (HERE / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["run", *COLUMNS])
        for name, metrics in results.items():
            values = (metrics.get(column, "") for column in COLUMNS)
            writer.writerow([name, *(f"{v:.6g}" if isinstance(v, float) else v for v in values)])
    plt.rcParams["svg.hashsalt"] = "kncompress"
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label in RUNS.items():
        tokens, perplexity = curve(folder / name)
        axes.plot([t / 1000 for t in tokens], perplexity, marker="o", markersize=3, label=label)
    axes.set(xlabel="training tokens (thousands)", ylabel="validation perplexity", yscale="log")
    axes.set_title("Repairing the factored mini teacher on the sample text")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
