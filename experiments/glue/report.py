"""Collect suites of ``glue`` into a table, and print what ILKD adds.

The difference of ILKD over plain fine-tuning is paired: same task, seed, examples and start. Its interval is the middle
95% of a bootstrap that draws tasks, and within each task seeds, so that neither few tasks nor few seeds pass for many.

Usage: python experiments/glue/report.py TABLE SUITE [NAME=SUITE ...]
The student that such a further suite trains by its own objective is called ``student_NAME``.
"""

import csv
import json
import random
import statistics
import sys
from pathlib import Path

COLUMNS = ("task", "seed", "who", "score", "parameters", "train_examples", "dev_examples", "best_epoch", "seconds")
DRAWS = 10_000


def differences(cells: list[dict], better: str, worse: str) -> dict[str, list[float]]:
    """{task: score of ``better`` less that of ``worse``, for each seed that has both}, in hundredths."""
    scores = {(cell["task"], cell["seed"], cell["who"]): cell["score"] for cell in cells}
    found: dict[str, list[float]] = {}
    for (task, seed, who), score in sorted(scores.items()):
        if who == better and (task, seed, worse) in scores:
            found.setdefault(task, []).append(100 * (score - scores[task, seed, worse]))
    return found


def interval(by_task: dict[str, list[float]], seed: int = 0) -> tuple[float, float]:
    """95% of the mean over tasks of the mean over seeds, by drawing tasks, and seeds within them, with replacement."""
    chance = random.Random(seed)
    tasks = list(by_task.values())
    means = []
    for _ in range(DRAWS):
        drawn = chance.choices(tasks, k=len(tasks))
        means.append(statistics.fmean(statistics.fmean(chance.choices(task, k=len(task))) for task in drawn))
    means.sort()
    return means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def lead_and_gain(cells: list[dict]) -> list[tuple[str, float, float]]:
    """(task, how far the teacher is ahead of plain fine-tuning, what ILKD adds to it) of each task and seed.

    The lead is that over the plain students of the other seeds: were it the same one, its luck would be in both.
    """
    scores = {(cell["task"], cell["seed"], cell["who"]): 100 * cell["score"] for cell in cells}
    found = []
    for task, seed, who in sorted(scores):
        others = [scores[task, s, "student"] for t, s, w in scores if (t, w) == (task, "student") and s != seed]
        if who == "student_ilkd" and others and (task, seed, "student") in scores:
            gain = scores[task, seed, who] - scores[task, seed, "student"]
            found.append((task, scores[task, seed, "teacher"] - statistics.fmean(others), gain))
    return found


def cells_of(suite: Path) -> list[dict]:
    """Task, seed, model and scores of each training."""
    return json.loads((suite / "table.json").read_text())["cells"]


def main(table: Path, suite: Path, further: dict[str, Path]) -> None:
    """Write the table; print that of the suite, and differences."""
    cells = cells_of(suite)
    for name, other in further.items():
        cells += [cell | {"who": f"student_{name}"} for cell in cells_of(other) if cell["who"] == "student_ilkd"]
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*COLUMNS, "scores"])
        for cell in cells:
            scores = " ".join(f"{name}={value:.4f}" for name, value in cell["scores"].items())
            values = (f"{cell[c]:.6g}" if isinstance(cell[c], float) else cell[c] for c in COLUMNS)
            writer.writerow([*values, scores])
    print((suite / "table.md").read_text())
    pairs = [("student_ilkd", other) for other in ("student", "layerdrop_ilkd", "teacher")]
    for better, worse in [*pairs, *((f"student_{name}", "student_ilkd") for name in further)]:
        found = differences(cells, better, worse)
        if found:
            low, high = interval(found)
            each = "; ".join(f"{t} {' '.join(f'{d:+.2f}' for d in values)}" for t, values in found.items())
            mean = statistics.fmean(map(statistics.fmean, found.values()))
            print(f"{better} - {worse}: {mean:+.2f} (95%: {low:+.2f} to {high:+.2f}); by seed: {each}")
    points = lead_and_gain(cells)
    if len(points) > 2:
        leads, gains = ([point[i] for point in points] for i in (1, 2))
        print(f"correlation of ILKD's gain with the teacher's lead: {statistics.correlation(leads, gains):.2f}")
        tasks = dict.fromkeys(point[0] for point in points)
        means = ((t, *(statistics.fmean(p[i] for p in points if p[0] == t) for i in (1, 2))) for t in tasks)
        print("; ".join(f"{task}: lead {lead:+.2f}, gain {gain:+.2f}" for task, lead, gain in means))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), {name: Path(at) for name, _, at in (w.partition("=") for w in sys.argv[3:])})
