"""What ``bench parts=[generate]`` measured, as ``runtimes.csv`` beside this file and as tables.

``runtimes.py FOLDER [NAME.csv]``: with a run folder ``bench-<name>`` for each pair of models.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = (
    "| runtime | weights | files, MB: dense, student | peak memory, MB | decoding, tokens/s: dense, student | "
    "of dense | promised | kept | eight at once | prompt, tokens/s: dense, student | of dense | promised | kept | "
    "eight at once |"
)
BITS = {"bits_32": "float32", "bits_8": "8 bits", "dynamic": "8 bits, dynamic", "bits_4": "4 bits"}
Rows = dict[str, dict[str, Any]]


def main(folder: Path, name: str = "runtimes.csv") -> None:
    """Write the file and print a table for each run."""
    lines: list[dict[str, Any]] = []
    for run in sorted(folder.glob("bench-*/bench.json")):
        found = json.loads(run.read_text())
        rows = {row["name"]: row for row in found["measurements"]}
        lines += [
            {"run": run.parent.name, "measured": name}
            | {key: row["values"].get(who) for key, who in (("dense", "dense"), ("student", "ours"))}
            | {"unit": row["unit"], "ratio": row["speedup"], "promised": row["promised"]}
            | {"ratio_in_processor_seconds": row["more"].get(f"{name}/speedup_in_processor_seconds")}
            for name, row in rows.items()
        ]
        print(f"\n{run.parent.name}: {found['machine']}\n\n{HEAD}\n|{'---|' * 14}")
        for prefix in dict.fromkeys(name[: name.index(f"/{kind(name)}")] for name in rows):
            print(line(prefix, rows))
    with (HERE / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def kind(name: str) -> str:
    """``prompt``, ``decoding``, ``memory`` or ``bytes``."""
    return next(part for part in name.split("/") if part in ("prompt", "decoding", "memory", "bytes"))


def line(prefix: str, rows: Rows) -> str:
    """Of one runtime and one kind of weights. Speeds and ratios are those of processor seconds where one thread ran."""
    _, runtime, *weights = prefix.split("/")
    cells = [runtime, BITS[weights[0]] if weights else "float32"]
    for what in ("bytes", "memory"):
        values = rows[f"{prefix}/{what}"]["values"] if f"{prefix}/{what}" in rows else {}
        cells.append(", ".join(f"{values[who] / 1e6:.0f}" for who in ("dense", "ours")) if "dense" in values else "")
    for what in ("decoding", "prompt"):
        name = f"{prefix}/{what}"
        if name not in rows:
            cells += [""] * 5
            continue
        row, eight = rows[name], next(iter(r for n, r in rows.items() if n.startswith(f"{name}/batch_")), None)
        each = 1 if what == "decoding" else int(row["what"].split()[2])
        ours = row["more"].get(f"{name}/processor_seconds", row["values"]["ours"])
        speeds = [each / (ours * ratio_of(row)), each / ours]
        cells.append(", ".join(f"{speed:.1f}" if speed < 100 else f"{speed:.0f}" for speed in speeds))
        ratio = ratio_of(row)
        cells += [f"{ratio:.2f}", f"{row['promised']:.2f}", f"{ratio / row['promised']:.2f}"]
        cells.append("" if eight is None else f"{ratio_of(eight):.2f}")
    return f"| {' | '.join(cells)} |"


def ratio_of(row: dict[str, Any]) -> float:
    """How many times as fast as the dense model."""
    return float(row["more"].get(f"{row['name']}/speedup_in_processor_seconds", row["speedup"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
