"""Collect the runs of ``run.sh`` or ``mini.sh`` into ``<name>.csv`` beside this file, and print them as a table.

Usage: python experiments/calibration/report.py RUNS NAME; runs that are not there are left out. Where there are runs
with several numbers of calibration tokens, ``<name>_sizes.csv`` and ``<name>_sizes.svg`` show them (matplotlib).
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = {
    "one_term": "one term, factor 2 on the hidden side",
    "two_by_two": "2x2, 2 terms",
    "four_by_four": "4x4, 8 terms",
    "outer_products": "outer products",
}
STARTS = ("nearest", "calibrated", "sequential")
COLUMNS = {
    "parameters/student": "parameters",
    "multiply_adds/student": "multiply-adds",
    "error/mean": "error",
    "error/weighted": "on inputs",
    "seconds/moments": "s moments",
    "seconds/fit": "s fit",
    "peak_gb": "peak GB",
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
                run = json.loads((folder / f"{shape}-{start}" / "run.json").read_text())
                if run.get("peak_memory_bytes"):
                    made["peak_gb"] = run["peak_memory_bytes"] / 1e9
                values = {key: made[key] for key in COLUMNS if key in made}
                found.append({"shape": shape, "start": start} | values | _perplexity(scored))
    return found


def _perplexity(scored: dict[str, float]) -> dict[str, float]:
    return {"perplexity": scored["perplexity"]}


def sizes(folder: Path) -> list[tuple[str, str, int, float]]:
    """(shape, start, calibration tokens, perplexity) of the runs that differ in their calibration tokens."""
    found = []
    for run in folder.glob("*-*-*-evaluated"):
        scored, (shape, start, tokens, _) = metrics(run), run.name.split("-")
        if scored is not None:
            found.append((shape, start, int(tokens), scored["perplexity"]))
    return sorted(found)


def draw(found: list[tuple[str, str, int, float]], file: Path) -> None:
    """Perplexity against calibration tokens, a line for each shape and start."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for shape, start in sorted({row[:2] for row in found}):
        points = [row[2:] for row in found if row[:2] == (shape, start)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{SHAPES[shape]}, {start}")
    axes.set(xscale="log", yscale="log", xlabel="calibration tokens", ylabel="perplexity, no training")
    axes.set_xticks(sorted({row[2] for row in found}), [f"{row // 1024}k" for row in sorted({row[2] for row in found})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main(folder: Path, name: str) -> None:
    """Write the files and print the table."""
    found = rows(folder)
    if scanned := sizes(folder):
        with (HERE / f"{name}_sizes.csv").open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["shape", "start", "tokens", "perplexity"])
            writer.writerows([*row[:3], f"{row[3]:.6g}"] for row in scanned)
        draw(scanned, HERE / f"{name}_sizes.svg")
    keys = ["shape", "start", *COLUMNS, "perplexity"]
    with (HERE / f"{name}.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(keys)
        for row in found:
            writer.writerow(f"{v:.6g}" if isinstance(v := row.get(key, ""), float) else v for key in keys)
    titles = ["shape", "start", *COLUMNS.values(), "perplexity"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in found:
        cells = [SHAPES.get(row["shape"], row["shape"]), row["start"], *(_cell(row.get(key)) for key in keys[2:])]
        print(f"| {' | '.join(cells)} |")


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}" if value < 1e5 else f"{value:,.0f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
