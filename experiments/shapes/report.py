"""Collect the runs of ``run.sh`` into ``results.csv``, ``pareto.svg`` and ``curves.svg`` beside this file.

Usage: python experiments/shapes/report.py RUNS          (the pictures need matplotlib, extra ``reports``)
       python experiments/shapes/report.py --best RUNS   prints the four kinds with the least KL at 68%
"""

import csv
import statistics
import sys
from pathlib import Path
from typing import Any

from kncompress.runs.past_runs import read_runs
from kncompress.runs.stored import read_result

HERE = Path(__file__).parent
LABELS = {
    "planner": "planner (packed low rank)",
    "packed": "packed low rank, uniform",
    "low_rank": "low rank, uniform",
    "sum_2x2": "sums, 2x2",
    "sum_2x4": "sums, 2x4",
    "sum_4x4": "sums, 4x4",
    "kngpt2": "KnGPT2's shapes, our fit",
    "kngpt2_nearest": "KnGPT2",
    "kronypt": "KronyPT's shapes, our fit",
    "layerdrop": "fewer layers",
}


def metrics_of(run: Path) -> dict[str, Any]:
    """Of a finished run; empty for others."""
    found = read_result(run, run.name)
    return found["metrics"] if found.get("status") == "finished" else {}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured of each run, by size and then KL."""
    rows = []
    for run in folder.glob("*-unread"):
        name, size, seed = run.name.removesuffix("-unread").rsplit("-", 2)
        made, unread = metrics_of(folder / f"{name}-{size}-{seed}"), metrics_of(run)
        if made and unread:
            rows.append(
                {
                    "shapes": name,
                    "size": size,
                    "seed": seed,
                    "parameters": made["parameters/student"],
                    "start": made["perplexity/start"],
                    "perplexity": made["perplexity/student"],
                    "kl": made["kl/student"],
                    "exl2_wiki": unread["perplexity"],
                    "dense": made["perplexity/teacher"],
                }
            )
    return sorted(rows, key=lambda row: (-int(row["size"]), row["kl"]))


def best(rows: list[dict[str, Any]], count: int = 4) -> list[str]:
    """Kinds with the least KL at 68%, of the first seed."""
    return [row["shapes"] for row in rows if row["size"] == "68" and row["seed"] == "0"][:count]


def main(folder: Path) -> None:
    """Write the files."""
    rows = rows_of(folder)
    with (HERE / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) and v < 1e6 else v for key, v in row.items()})
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    draw_pareto(rows)
    draw_curves(folder, rows)


def draw_pareto(rows: list[dict[str, Any]]) -> None:
    """Perplexity against parameters: a point a kind and size, the mean of its seeds with their range."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, label in LABELS.items():
        points = []
        for size in ("50", "68"):
            found = [row for row in rows if row["shapes"] == name and row["size"] == size]
            if found:
                values = [row["perplexity"] for row in found]
                mean = statistics.fmean(values)
                points.append((found[0]["parameters"] / 1e6, mean, mean - min(values), max(values) - mean))
        if points:
            x, y, below, above = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=(below, above), marker="o", markersize=4, capsize=3, linewidth=1, label=label)
    axes.plot(6.967296, rows[0]["dense"], marker="*", markersize=12, linestyle="", color="black", label="dense")
    axes.set(xlabel="unique parameters (millions)", ylabel="perplexity after 98,304 tokens", yscale="log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(HERE / "pareto.svg", metadata={"Date": None})


def draw_curves(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Validation perplexity against tokens, a panel for each size."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", sharey=True)
    for axes, size in zip(panels, ("68", "50"), strict=True):
        for row in (row for row in rows if row["size"] == size and row["seed"] == "0"):
            (run,) = read_runs([str(folder / f"{row['shapes']}-{size}-0")])
            tokens, perplexity = zip(*run.by_tokens("validation/perplexity"), strict=True)
            color = f"C{list(LABELS).index(row['shapes'])}"
            axes.plot([t / 1000 for t in tokens], perplexity, label=LABELS[row["shapes"]], color=color, linewidth=1)
        axes.set(title=f"{size}% of the parameters", xlabel="thousand tokens", yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(visible=True, which="both", alpha=0.3)
    panels[0].set_ylabel("validation perplexity")
    panels[0].legend(fontsize=7)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1] == "--best":
        print(*best(rows_of(Path(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
