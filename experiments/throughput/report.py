"""All figures of a folder of ``bench`` runs as one CSV, and how they stand to the targets.

Usage: python experiments/throughput/report.py FOLDER RESULTS.csv
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

TARGETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "step/speedup": ("at least 2", lambda value: value >= 2),
    "step/memory_ratio": ("at most 0.5", lambda value: value <= 0.5),
    "step/data_wait": ("below 0.01", lambda value: value < 0.01),
    "fit/seconds": ("under 5", lambda value: value < 5),
    "fit/speedup": ("at least 10", lambda value: value >= 10),
    "generate/promise": ("at least 0.85", lambda value: value >= 0.85),
    "generate/transformers/decoding/promise": ("at least 0.85", lambda value: value >= 0.85),
    "tokens/speedup": ("at least 1", lambda value: value >= 1),
}


def target_of(name: str) -> tuple[str, Callable[[float], bool]] | None:
    """What a metric should reach, where that is laid down."""
    if name.startswith("product/speed/"):
        return ("at least 1", lambda value: value >= 1) if name.endswith("/speedup") else None
    if name.startswith("product/") and name.endswith("/promise"):
        return "at least 0.85", lambda value: value >= 0.85
    return TARGETS.get(name)


def main(folder: Path, file: Path) -> None:
    """Write the CSV; print what has a target."""
    rows = []
    for result in sorted(folder.glob("*/result.json")):
        values = json.loads(result.read_text())
        if values["status"] != "finished" or values["verb"] != "bench":
            continue
        machine = json.loads((result.parent / "bench.json").read_text())["machine"]
        rows += [(result.parent.name, name, value, machine) for name, value in values["metrics"].items()]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("run", "metric", "value", "machine"), *rows])
    for run, name, value, _ in rows:
        target = target_of(name)
        if target is not None and value is not None:
            print(f"{'met ' if target[1](value) else 'MISS'}  {value:8.3f}  {target[0]:<13}  {run}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
