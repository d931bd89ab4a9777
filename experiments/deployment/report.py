"""What ``study.py`` found, as ``results.csv`` beside this file, ``docs/frontier.svg``, and a table.

Usage: python experiments/deployment/report.py FOLDER; the picture needs matplotlib (extra ``reports``).
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("dense", "speed", "packed")
BITS = (32, 8, 4)
TIMES = ("decoding", "decoding_cpu", "prompt", "prompt_cpu")
WHAT = {"dense": "dense", "speed": "0.667, `speed`", "packed": "0.667, packed"}
PROMPT = 512
Row = dict[str, str | float]


def main(folder: Path) -> None:
    """Write both files and print the table."""
    scores, times = _read(folder / "scores.csv"), _read(folder / "times.csv")
    texts = list(dict.fromkeys(row["text"] for row in scores))
    rows = [_row(f"{kind}-{bits}", kind, bits, scores, times, texts) for bits in BITS for kind in KINDS]
    with (HERE / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, texts)
    print(
        "| | megabytes | perplexity, WikiText-2 / web | decoding, tokens/s | of dense | prompt, tokens/s | of dense |"
        " two threads: decoding, prompt |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        dense = row["kind"] == "dense"
        ratios = ["" if dense else f"{row[name]:.2f}" for name in ("decoding_cpu/1", "prompt_cpu/1")]
        cells = [
            f"{WHAT[str(row['kind'])]}, {row['bits']} bits",
            f"{float(row['bytes']) / 1e6:.1f}",
            " / ".join(f"{float(row[text]):.2f}" for text in texts),
            f"{1 / float(row['decoding_cpu/seconds']):.1f}",
            ratios[0],
            f"{PROMPT / float(row['prompt_cpu/seconds']):.0f}",
            ratios[1],
            "" if dense else f"{row['decoding/2']:.2f} / {row['prompt/2']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _row(
    name: str, kind: str, bits: int, scores: list[dict[str, str]], times: list[dict[str, str]], texts: list[str]
) -> Row:
    """Bytes, perplexities, median seconds with one thread, and medians of the ratios to the dense one of the round."""
    own = {row["text"]: row for row in scores if row["folder"] == name}
    row: Row = {"folder": name, "kind": kind, "bits": bits, "bytes": float(next(iter(own.values()))["bytes"])}
    row |= {text: float(own[text]["perplexity"]) for text in texts}
    for what in TIMES:
        seconds = defaultdict[tuple[str, str], dict[str, float]](dict)
        for time in times:
            seconds[time["threads"], time["folder"]][time["round"]] = float(time[what])
        row[f"{what}/seconds"] = statistics.median(seconds["1", name].values())
        for threads in ("1", "2"):
            mine, dense = seconds[threads, name], seconds[threads, f"dense-{bits}"]
            ratios = [dense[number] / value for number, value in mine.items() if number in dense]
            row[f"{what}/{threads}"] = statistics.median(ratios) if ratios else float("nan")
    return row


def draw(rows: list[Row], texts: list[str]) -> None:
    """Perplexity on each text against bytes, and tokens a second against bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "deployment"
    from matplotlib import pyplot

    titles = ["perplexity, WikiText-2 test", "perplexity, web text"][: len(texts)]
    panels = [*zip(titles, texts, strict=True), ("tokens per second, one thread", "decoding_cpu/seconds")]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for axis, (title, column) in zip(axes, panels, strict=True):
        for kind, colour in zip(KINDS, ("#555555", "#1f77b4", "#d95f02"), strict=True):
            points = [row for row in rows if row["kind"] == kind]
            values = [float(row[column]) for row in points]
            if "seconds" in column:
                values = [1 / value for value in values]
            axis.plot([float(row["bytes"]) / 1e6 for row in points], values, "o-", color=colour, label=kind)
            for row, value in zip(points, values, strict=True):
                axis.annotate(
                    str(row["bits"]),
                    (float(row["bytes"]) / 1e6, value),
                    fontsize=7,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
        axis.set(title=title, xlabel="megabytes", xscale="log")
        axis.set_xticks([60, 100, 200, 400], ["60", "100", "200", "400"])
        axis.minorticks_off()
        if "perplexity" in title:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(HERE.parents[1] / "docs" / "frontier.svg", metadata={"Date": None})


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
