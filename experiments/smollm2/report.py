"""Collect the runs of ``run.sh`` into ``results.csv``, ``search.csv``, ``bytes.csv``, ``tasks.csv`` and ``curves.svg``.

Usage: python experiments/smollm2/report.py RUNS
       python experiments/smollm2/report.py --rate SEARCHES STUDENT   prints the best rate of a search
The picture needs matplotlib (extra ``reports``).
"""

import csv
import math
import sys
from pathlib import Path
from typing import Any

from kncompress.runs.past_runs import read_runs
from kncompress.runs.stored import read_result

HERE = Path(__file__).parent
STUDENTS = {
    "planner": "planned packed low rank",
    "repaired": "the same, repaired first",
    "uniform": "uniform low rank (whitened SVD)",
    "kronecker": "uniform Kronecker sums",
    "layerdrop": "18 of 30 layers",
    "kngpt2": "the paper's shapes and start",
}
COLUMNS = {
    "parameters": "parameters/student",
    "tokens": "tokens",
    "start": "perplexity/start",
    "wikitext2": "perplexity/student",
    "unseen": "unseen/perplexity/student",
    "kl": "kl/student",
    "unseen_kl": "unseen/kl/student",
    "same_top": "compare/same_top",
    "unseen_same_top": "unseen/compare/same_top",
    "tokens_per_second": "tokens_per_second",
}


TASKS = {
    "next_sentence": ("tasks", "local_next_sentence/acc"),
    "sst2": ("tasks", "local_sst2/acc"),
    "last_word": ("passages", "lambada/accuracy"),
    "last_word_perplexity": ("passages", "lambada/perplexity"),
}
"""Column: (run, metric)"""


def metrics_of(run: Path) -> dict[str, Any]:
    """Of a finished run; empty for others."""
    found = read_result(run, run.name)
    return found["metrics"] if found.get("status") == "finished" else {}


def curve(run: Path, metric: str) -> list[tuple[float, float]]:
    """Training tokens and a metric, of runs on their way too; empty where there is no run."""
    return read_runs([str(run)])[0].by_tokens(metric) if (run / "run.json").exists() else []


def losses(folder: Path, student: str) -> dict[str, float]:
    """Validation loss at the end of each run of a search, by its rate."""
    found = {run.name.removeprefix(f"{student}-"): curve(run, "validation/loss") for run in folder.glob(f"{student}-*")}
    return {rate: points[-1][1] for rate, points in sorted(found.items()) if points}


def write(name: str, header: list[str], rows: list[list[Any]]) -> None:
    """A table beside this file, where there are rows."""
    if not rows:
        return
    with (HERE / name).open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)


def main(folder: Path) -> None:
    """Write the files."""
    found = {name: metrics_of(folder / name) for name in STUDENTS}
    rows = [[name, *(metrics[key] for key in COLUMNS.values())] for name, metrics in found.items() if metrics]
    write("results.csv", ["student", *COLUMNS], rows)
    searched = {name: losses(folder / "search", name) for name in STUDENTS}
    write(
        "search.csv",
        ["student", "rate", "validation"],
        [[name, rate, math.exp(loss)] for name in STUDENTS for rate, loss in searched[name].items()],
    )
    rounded = {f"dense, {bits} bits": metrics_of(folder / f"dense_{bits}-unseen") for bits in (5, 4)}
    rounded |= {f"{name}, 8 bits": metrics_of(folder / f"{name}-8bits") for name in STUDENTS}
    columns = ("bytes", "perplexity", "compare/kl_mean", "compare/same_top")
    write("bytes.csv", ["model", *columns], [[name, *(m[c] for c in columns)] for name, m in rounded.items() if m])
    write("tasks.csv", ["model", *TASKS], [row for name in ("dense", *STUDENTS) if (row := solved(folder, name))])
    draw(folder)


def solved(folder: Path, name: str) -> list[Any]:
    """Row of a model in ``tasks.csv``; empty where it was not run."""
    found = {kind: metrics_of(folder / f"{name}-{kind}") for kind in ("tasks", "passages")}
    return [name, *(found[kind][metric] for kind, metric in TASKS.values())] if all(found.values()) else []


def draw(folder: Path) -> None:
    """Perplexity of both texts against tokens."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for axes, text, title in zip(panels, ("validation", "unseen"), ("WikiText-2", "unread web text"), strict=True):
        for name, label in STUDENTS.items():
            if points := curve(folder / name, f"{text}/perplexity"):
                tokens, values = zip(*points, strict=True)
                axes.plot([count / 1000 for count in tokens], values, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="training tokens, thousands", ylabel="perplexity", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(visible=True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1] == "--rate":
        found = losses(Path(sys.argv[2]), sys.argv[3])
        print(min(found, key=lambda rate: found[rate]))
    else:
        main(Path(sys.argv[1]))
