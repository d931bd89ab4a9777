"""A long distillation beside one that is killed in the middle: memory, files and threads of both, and their bits.

Usage: python experiments/soak/soak.py FOLDER STEPS [overrides of train]; Linux, for it reads /proc. Called again, it
goes on with what is unfinished. Writes ``samples.csv``, ``soak.svg`` and ``soak.json`` into the folder.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

EVERY = 10.0
"""Seconds between samples."""
COLUMNS = ("seconds", "run", "step", "process", "memory_mb", "files", "threads")
WANDB = "W&B's service"
SETTINGS = (
    "model=mini", "data=sample", "factors=kngpt2", "objective=ilkd", "trainer.accelerator=cpu",
    "trainer.batch_tokens=512", "trainer.micro_batch_tokens=512", "trainer.validate_every=10",
    "trainer.validation_tokens=2048", "trainer.test_tokens=4096", "trainer.precision=fp32",
    "logger=wandb", "logger.mode=offline", "samples.count=0",
)  # fmt: skip


class Run:
    """One ``train`` in a folder of its own, started again by ``resume=auto`` where it was killed."""

    def __init__(self, name: str, folder: Path, words: list[str]) -> None:
        self.name, self.folder = name, folder / name
        line = [sys.executable, "-m", "kncompress", "train", *words, "resume=auto", f"run_dir={self.folder}"]
        self.log = (folder / f"{name}.log").open("a")
        self.line, self.code, self.kills = line, None, 0
        self.start()

    def start(self) -> None:
        """Begin, or go on."""
        self.process = subprocess.Popen(self.line, stdout=self.log, stderr=subprocess.STDOUT)

    @property
    def step(self) -> int:
        """The last one in ``metrics.csv``."""
        rows = metrics(self.folder)
        return max(rows, default=0)

    def sample(self) -> list[tuple[str, float, int, int]]:
        """(what, MB resident, open files, threads) of the run and of what it has started."""
        found = []
        for pid in [self.process.pid, *children(self.process.pid)]:
            try:
                status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            except (OSError, ValueError):
                continue  # it has just ended
            if "VmRSS" in status:
                what = "train" if pid == self.process.pid else WANDB
                found.append((what, int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])))
        return found


def children(pid: int) -> list[int]:
    """Processes below this one."""
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in children(child)]


def metrics(folder: Path) -> dict[int, dict[str, str]]:
    """{step: what ``metrics.csv`` says of it}, without times and speeds."""
    file = folder / "metrics.csv"
    if not file.exists():
        return {}
    rows: dict[int, dict[str, str]] = {}
    for row in csv.DictReader(file.read_text().splitlines()):
        if row.get("step", "").isdecimal():
            rows[int(row["step"])] = {k: v for k, v in row.items() if k.endswith(("loss", "/lr", "perplexity"))}
    return rows


def watch(runs: list[Run], steps: int, file: Path) -> None:
    """Sample until all have ended; the second one is killed once, in the middle."""
    began = time.monotonic()
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        while any(run.process.poll() is None for run in runs):
            for run in runs:
                if run.process.poll() is None:
                    seconds, step = round(time.monotonic() - began, 1), run.step
                    table.writerows([(seconds, run.name, step, *s[:1], round(s[1], 1), *s[2:]) for s in run.sample()])
            stream.flush()
            late = runs[-1]
            if not late.kills and late.step >= steps // 2 and late.process.poll() is None:
                late.process.kill()
                late.process.wait()
                late.kills += 1
                print(f"killed at step {late.step} of {steps}", flush=True)
                late.start()
            time.sleep(EVERY)


def report(folder: Path, runs: list[Run], file: Path) -> dict[str, Any]:
    """How far memory, files and threads moved over the last two thirds of each process, and whether the bits agree."""
    rows = list(csv.DictReader(file.read_text().splitlines()))
    found: dict[str, Any] = {"minutes": round(float(rows[-1]["seconds"]) / 60, 1), "samples": len(rows)}
    for run in runs:
        mine = [row for row in rows if row["run"] == run.name and row["process"] == "train" and int(row["step"]) > 0]
        mine = mine[len(mine) // 3 :]
        found[run.name] = {"exit code": run.process.returncode, "kills": run.kills, "steps": run.step}
        for column in ("memory_mb", "files", "threads"):
            values = [float(row[column]) for row in mine]
            found[run.name][column] = [values[0], values[-1]] if values else []
    one, other = (metrics(run.folder) for run in runs)
    shared = sorted(one.keys() & other.keys())
    found["rows of metrics compared"], found["rows that differ"] = len(shared), sum(one[s] != other[s] for s in shared)
    weights = [run.folder / "model" / "model.safetensors" for run in runs]
    if all(weight.exists() for weight in weights):
        found["weights"] = "same bits" if weights[0].read_bytes() == weights[1].read_bytes() else "different"
    (folder / "soak.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(rows, folder / "soak.svg")
    return found


def draw(rows: list[dict[str, str]], file: Path) -> None:
    """A panel each for memory, open files and threads over the minutes."""
    plt.rcParams["svg.hashsalt"] = "kncompress"
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for axes, column in zip(panels, ("memory_mb", "files", "threads"), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            mine = [row for row in rows if row["run"] == run and row["process"] == "train"]
            axes.plot([float(r["seconds"]) / 60 for r in mine], [float(r[column]) for r in mine], label=run, lw=1)
        axes.set(title=column.replace("_mb", ", MB").replace("files", "open files"), xlabel="minutes", ylim=(0, None))
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(folder: Path, steps: int, words: list[str]) -> int:
    """Exit code 0 where both runs have finished with the same bits."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [*SETTINGS, f"trainer.steps={steps}", *words]
    runs = [Run("whole", folder, given), Run("killed", folder, given)]
    watch(runs, steps, folder / "samples.csv")
    found = report(folder, runs, folder / "samples.csv")
    print(json.dumps(found, indent=2))
    return 0 if found.get("weights") == "same bits" and not found["rows that differ"] else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
