"""Seconds and peak memory of compress on Llamas of random weights in bfloat16; results.csv and its picture grow.

``measure.py FOLDER MODEL START [overrides]``: MODEL is a name of random_llama.py, with ``-N`` for N layers of that size
(memory does not depend on their number). ``measure.py FOLDER kills MODEL [overrides]``: compress killed at five random
moments and taken up again, against one that was not.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from random_llama import main as make

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
FIELDS = ("code", "model", "start", "seconds", "cpu_seconds", "peak_gb", "told_gb", "written_gb")


def model_in(folder: Path, name: str) -> Path:
    """The model's folder, made where it is not there."""
    size, _, layers = name.partition("-")
    if not (folder / name / "model.safetensors.index.json").exists():
        make(size, folder / name, *([int(layers)] if layers else []))
    return folder / name


def command(model: Path, run: Path, words: list[str]) -> list[str]:
    """The command line of a run."""
    fixed = ["factors=kngpt2", "model.tokenizer=asset:mini", "data.source=sample", "calibration.tokens=4096"]
    return [sys.executable, "-m", "kncompress", "compress", f"model={model}", f"run_dir={run}", *fixed, *words]


def measured(line: list[str]) -> tuple[float, float, float, str]:
    """Seconds, seconds of processors, largest resident set in GB, and what the command has printed."""
    began = time.monotonic()
    child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(line)}: exit code {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, printed


def measure(folder: Path, name: str, start: str, words: list[str]) -> None:
    """One row of the table. ``CODE`` in the environment names the code that was run, ``after`` otherwise."""
    run = folder / f"run-{name}-{start}"
    line = command(model_in(folder, name), run, [f"start={start}", *words])
    seconds, cpu, peak, printed = measured(line)
    told = next((text.split(" GB")[0].split()[-1] for text in printed.splitlines() if "GB of memory" in text), "")
    written = sum(file.stat().st_size for file in (run / "model").iterdir()) / 1e9
    row = [os.environ.get("CODE", "after"), name, " ".join([start, *words]), f"{seconds:.0f}", f"{cpu:.0f}"]
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(([FIELDS] if fresh else []) + [[*row, f"{peak:.2f}", told, f"{written:.2f}"]])


def kills(folder: Path, name: str, words: list[str], seed: int = 0) -> None:
    """Kill a run five times and compare its folder with that of one that was left alone."""
    model, draw = model_in(folder, name), random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    measured(command(model, whole, words))
    parts = len(list((whole / "model").glob("*.safetensors")))
    for at in sorted(draw.sample(range(parts - 1), 5)):
        child = subprocess.Popen(command(model, cut, words), stdout=subprocess.DEVNULL)
        while child.poll() is None and len(list((cut / "parts").glob("*.json"))) < at:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
        print(f"killed with {len(list((cut / 'parts').glob('*.json')))} of {parts} parts", flush=True)
        assert not (cut / "model").exists()
    measured(command(model, cut, words))
    names = {file.name for file in (whole / "model").iterdir()}
    assert names == {file.name for file in (cut / "model").iterdir()}
    differ = [
        n for n in names - {"README.md"} if (whole / "model" / n).read_bytes() != (cut / "model" / n).read_bytes()
    ]
    print(f"{len(names)} files, {len(differ)} differ (README.md, which tells the seconds, aside): {differ}")


if __name__ == "__main__":
    if sys.argv[2] == "kills":
        kills(Path(sys.argv[1]), sys.argv[3], sys.argv[4:])
    else:
        measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
