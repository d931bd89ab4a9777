"""Repair or train? Equal seconds of fit, repair and distillation on the mini teacher with KnGPT2's shapes.

Usage: KNCOMPRESS_DATA=<folder with text/> OMP_NUM_THREADS=1 python experiments/repair/seconds.py [folder for the runs]

Seconds are those of the processor, so that other jobs on the machine change little. Two short trainings and two fits
give the cost of a token and of a pass; from these follow the tokens that are left for the distillation in each split.
Finished runs are not repeated. Writes ``seconds.csv`` and ``seconds.svg`` beside this file (extra ``reports``).
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOTALS = (90, 240, 480)
"""Seconds of the processor for everything but the measurements."""
PASSES = (0, 2, 8, 25)
STEP = 4096
"""Tokens of a step: of the demo."""
COMMON = ["model=mini", "data=sample", "factors=kngpt2", "start=calibrated", "fit.symmetries=[]"]


def run(folder: Path, *words: str) -> dict[str, float]:
    """The metrics of a run of kncompress and ``seconds``, its processor seconds; as kept, if it has finished."""
    kept = folder / "processor_seconds.json"
    if not kept.exists():
        child = subprocess.Popen([sys.executable, "-m", "kncompress", *words, f"run_dir={folder}"])
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{folder.name}: exit status {status}")
        kept.write_text(json.dumps(usage.ru_utime + usage.ru_stime))
    metrics: dict[str, float] = json.loads((folder / "result.json").read_text())["metrics"]
    return metrics | {"seconds": json.loads(kept.read_text())}


def train(folder: Path, passes: int, tokens: int) -> dict[str, float]:
    """A run of ``train``: ILKD at the demo's rate, the last weights, no validation on the way."""
    return run(
        folder,
        *(
            "train",
            "+experiment=wikitext_ilkd",
            "objective=ilkd",
            *COMMON,
            f"repair.passes={passes}",
            f"trainer.tokens={tokens}",
        ),
        *("trainer.keep=last", "trainer.validate_every=1000000", "trainer.test_tokens=65536"),
        *("optimizer.factor_rates=scaled", "optimizer.warmup=0.1", "samples.count=0", "logger=none"),
    )


def costs(folder: Path) -> tuple[float, float, float]:
    """Processor seconds of the fit alone (with what every run needs to begin), of a pass of repair, of a token."""
    none, four = (
        run(folder / f"fit-{passes}", "compress", *COMMON, f"repair.passes={passes}")["seconds"] for passes in (0, 4)
    )
    short, longer = (train(folder / f"train-{steps}", 0, steps * STEP)["seconds"] for steps in (2, 10))
    return none, (four - none) / 4, (longer - short) / (8 * STEP)


def main(folder: Path) -> None:
    """Make the runs, write the table and the picture."""
    unread = Path(os.environ["KNCOMPRESS_DATA"]) / "text" / "exl2_wiki.txt"
    fit, one_pass, token = costs(folder)
    print(f"fit {fit:.1f} s, a pass {one_pass:.2f} s, 1,000 tokens {1000 * token:.2f} s", flush=True)
    rows = []
    for total in TOTALS:
        for passes in PASSES:
            steps = int((total - fit - passes * one_pass) / token / STEP)
            if steps < 1:
                continue
            here = folder / f"{total}-{passes}"
            found = train(here, passes, steps * STEP)
            score = run(here / "unread", "evaluate", f"model={here}/model", f"data.source={unread}", "tokens=16000")
            values = found["perplexity/start"], found["perplexity/student"], found["kl/student"], score["perplexity"]
            rows.append([total, passes, steps * STEP, *(f"{value:.5g}" for value in values)])
            print(*rows[-1], flush=True)
    header = ["seconds", "passes", "tokens", "start", "perplexity", "kl", "exl2_wiki"]
    with (HERE / "seconds.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    draw([dict(zip(header, row, strict=True)) for row in rows])


def draw(rows: list[dict[str, str]]) -> None:
    """Perplexity on both texts against seconds, a line for each number of passes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for axes, text, title in zip(panels, ("perplexity", "exl2_wiki"), ("test text", "unread text"), strict=True):
        for passes in PASSES:
            line = [row for row in rows if row["passes"] == passes]
            if not line:  # the time was too short for so many
                continue
            label = f"{passes} passes of repair" if passes else "distillation alone"
            axes.plot([row["seconds"] for row in line], [float(row[text]) for row in line], marker="o", label=label)
        axes.set(title=title, xlabel="processor seconds in all", ylabel="perplexity")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(HERE / "seconds.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/repair_seconds"))
