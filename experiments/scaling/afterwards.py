"""Seconds and peak memory of what comes after compress, on Llamas of random weights; afterwards.csv grows.

``afterwards.py FOLDER MODEL VERB [overrides]``: MODEL is a name of random_llama.py, VERB ``evaluate``, ``generate`` or
``export``. With ``compressed`` after the name (``0.3B:compressed``) it is what ``measure.py FOLDER MODEL nearest`` has
left. ``CODE`` in the environment names the code that was run.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

from measure import HERE, measured, model_in

RESULTS = HERE / "afterwards.csv"
FIELDS = ("code", "model", "verb", "seconds", "cpu_seconds", "peak_gb")
WORDS = {
    "evaluate": ["data.source=sample", "tokens=4096", "context=512", "batch_tokens=2048"],
    "generate": ["prompt=The river", "tokens=8", "temperature=0"],
    "export": ["format=dense"],
}
"""Overrides that each verb has anyway."""


def main(folder: Path, name: str, verb: str, words: list[str]) -> None:
    """One row of the table."""
    size, _, compressed = name.partition(":")
    model = folder / f"run-{size}-nearest" / "model" if compressed else model_in(folder, size)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        fixed = [f"model={model}", "model.tokenizer=asset:mini", f"run_dir={run}/run", *WORDS[verb]]
        seconds, cpu, peak, _ = measured([sys.executable, "-m", "kncompress", verb, *fixed, *words])
    row = [os.environ.get("CODE", "after"), name, " ".join([verb, *words])]
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(([FIELDS] if fresh else []) + [[*row, f"{seconds:.0f}", f"{cpu:.0f}", f"{peak:.2f}"]])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
