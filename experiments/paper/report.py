"""The rows of the paper's tables from the runs of ``run.sh``, beside published ones.

Usage: python experiments/paper/report.py RUNS RESULTS_CSV
Published: zero-shot perplexity as measured by Krony-PT (arXiv 2412.12351), parameters counted by unique ones;
perplexity after fine-tuning and GLUE of KnGPT2 (arXiv 2110.08152), whose own count leaves out the head.
"""

import csv
import sys
from pathlib import Path
from typing import Any

from kncompress.runs.stored import read_result

MODELS = ("teacher", "distilled", "kngpt2", "ours", "planner", "layerdrop")
COLUMNS = ("model", "parameters", "wikitext103", "wikitext2", "lambada", "wikitext103_tuned", "glue_plain", "glue_ilkd")
PUBLISHED = (
    ("GPT-2, published", 124e6, 29.16, 24.67, 45.28, "", "79.81", ""),
    ("DistilGPT2, published", 82e6, 44.53, 36.48, 76.00, 23.7, "76.8", ""),
    ("KnGPT2, published", 119e6, 40.97, 32.81, 67.62, 20.5, "", "79.25"),
    ("KronyPT-81M, published", 82e6, 42.74, 35.75, 61.02, "", "", ""),
    ("TQCompressedGPT2, published", 119e6, 40.28, 32.25, 64.72, "", "", ""),
)


def metrics_of(run: Path) -> dict[str, Any]:
    """``metrics`` of ``result.json``; empty where the run has not finished."""
    metrics: dict[str, Any] = read_result(run, run.name).get("metrics", {})
    return metrics


def row_of(folder: Path, name: str) -> list[Any]:
    """What was measured of one model; blanks for what was not."""
    scores = {
        text: metrics_of(folder / "scores" / f"{name}-{text}") for text in ("wikitext103", "wikitext2", "lambada")
    }
    tuned, glue = metrics_of(folder / f"tuned-{name}"), metrics_of(folder / f"glue-{name}")
    return [
        name,
        scores["wikitext103"].get("parameters", ""),
        *(scores[text].get("perplexity_window_mean", "") for text in ("wikitext103", "wikitext2")),
        scores["lambada"].get("lambada/perplexity", ""),
        tuned.get("perplexity/student", ""),
        glue.get("glue/average/student", ""),
        glue.get("glue/average/student_ilkd", ""),
    ]


def main(folder: Path, file: Path) -> None:
    """Write the table and print it."""
    rows = [list(COLUMNS), *(row_of(folder, name) for name in MODELS), *map(list, PUBLISHED)]
    shown = [[f"{cell:.5g}" if isinstance(cell, float) and cell < 1e6 else cell for cell in row] for row in rows]
    with file.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(shown)
    print(file.read_text())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
