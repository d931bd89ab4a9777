"""Memory and time of compress against the model's size: what was measured (results.csv), and what the formula tells.

``picture.py`` writes docs/growth.svg. It needs matplotlib (extra ``reports``).
"""

import csv
from pathlib import Path

import matplotlib
from random_llama import SIZES, config_of

from kncompress.compression.forecast import SECONDS_A_NUMBER, START_SECONDS, Forecast, forecast
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import CalibrationConfig, CompressConfig, FactorConfig, FactorsConfig, FitConfig, ModelConfig

HERE = Path(__file__).parent
STARTS = {"nearest": "C0", "calibrated fit.sides=inputs": "C1", "calibrated": "C2", "sequential": "C3"}
"""Those of results.csv, each with its colour."""
ON = {"after": "o", "after, one core without AVX-512": "s"}
"""Machines of results.csv, each with its marker."""
RATE = 40e9
"""Multiply-adds a second of one core of both machines, about."""
HALF = FactorConfig(right=[2, 1])
KNGPT2 = FactorsConfig(
    layers="odd", embedding=FactorConfig(right=[1, 2]), qkv=HALF, o=FactorConfig(right=[1, 2]), mlp=HALF
)


def told(size: str, start: str) -> Forecast:
    """Of a Llama and the settings of measure.py."""
    word, _, sides = start.partition(" fit.sides=")
    settings = CompressConfig(
        model=ModelConfig(path=size),
        factors=KNGPT2,
        start=word,
        fit=FitConfig(sides=sides or "both"),
        calibration=CalibrationConfig(tokens=4096),
    )
    fields = config_of(size)
    return forecast(settings, fields, StudentPlan.of(KNGPT2, fields))


def told_seconds(need: Forecast) -> float:
    """As ``Forecast.seconds``, on a core of ``RATE``."""
    return START_SECONDS + SECONDS_A_NUMBER * need.numbers + need.operations / RATE


def measured(start: str, column: str) -> list[tuple[float, float, str]]:
    """(billions of parameters, value, marker) of the rows of a start; seconds, of models with all their layers."""
    found = []
    with (HERE / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            size, _, layers = row["model"].partition("-")
            if row["start"] == start and row["code"] in ON and row[column]:
                value = float(row[column])
                if column == "cpu_seconds" and layers:
                    continue
                found.append((told(size, start).numbers / 1e9, value, ON[row["code"]]))
    return found


def main() -> None:
    """Two panels: memory and processor seconds."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kncompress"
    from matplotlib import pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for start, colour in STARTS.items():
        forecasts = [told(size, start) for size in SIZES]
        sizes = [each.numbers / 1e9 for each in forecasts]
        memory.plot(sizes, [each.memory / 1e9 for each in forecasts], color=colour, label=start)
        for axes, column in ((memory, "peak_gb"), (seconds, "cpu_seconds")):
            for size, value, marker in measured(start, column):
                axes.plot(size, value, marker, color=colour, markersize=5)
        seconds.plot(sizes, [told_seconds(each) for each in forecasts], color=colour)
    memory.plot(sizes, [2 * size for size in sizes], ":", color="grey", label="the model's files (bfloat16)")
    memory.set(title="largest resident memory, GB", xlabel="parameters, billions", xscale="log", yscale="log")
    seconds.set(title="processor seconds", xlabel="parameters, billions", xscale="log", yscale="log")
    for axes in (memory, seconds):
        axes.grid(visible=True, alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE.parents[1] / "docs" / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
