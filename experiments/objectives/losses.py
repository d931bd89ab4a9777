"""Collect the runs of ``losses.sh`` or ``demo.sh`` into a table.

Usage: python experiments/objectives/losses.py RUNS TABLE
       python experiments/objectives/losses.py --rate SEARCHES OBJECTIVE   prints the best rate of a search
"""

import csv
import sys
from pathlib import Path
from typing import Any

from kncompress.runs.past_runs import read_runs
from kncompress.runs.stored import read_result


def metrics_of(run: Path) -> dict[str, Any]:
    """``metrics`` of ``result.json``."""
    metrics: dict[str, Any] = read_result(run, run.name)["metrics"]
    return metrics


def searched(folder: Path, objective: str) -> dict[str, float]:
    """Last validation loss of the runs of a search, by rate."""
    runs = {path.name: read_runs([str(path)])[0] for path in sorted(folder.glob(f"{objective}-*"))}
    return {name.removeprefix(f"{objective}-"): run.curves["validation/loss"][-1][1] for name, run in runs.items()}


def main(folder: Path, table: Path) -> None:
    """Write the table, the least KL first."""
    rows = []
    for run in folder.glob("*-unread"):
        name, rate = run.name.removesuffix("-unread").split("-", 1)
        made = metrics_of(folder / f"{name}-{rate}")
        scores = made["perplexity/start"], made["perplexity/student"], made["kl/student"], metrics_of(run)["perplexity"]
        rows.append([name, rate, *scores, made["tokens_per_second"]])
    header = ["objective", "rate", "start", "perplexity", "kl", "exl2_wiki", "tokens_per_second"]
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(
            [f"{v:.5g}" if isinstance(v, float) else v for v in r] for r in sorted(rows, key=lambda r: r[4])
        )


if __name__ == "__main__":
    if sys.argv[1] == "--rate":
        found = searched(Path(sys.argv[2]), sys.argv[3])
        print(min(found, key=lambda rate: found[rate]))
    else:
        main(*map(Path, sys.argv[1:]))
