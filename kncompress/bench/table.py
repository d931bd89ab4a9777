"""The measurements for a reader: a table on the terminal and in markdown, and a picture."""

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from rich.table import Table

from kncompress.bench.machine import Ceiling
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.operators import in_words
from kncompress.terminal import markdown_table, table

HEAD = ("measured", "ours", "bound", "of bound", "speed-up", "promised", "kept", "over others")


def table_rows(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Cells as ``HEAD`` names them; what a figure does not have is empty."""
    return [_cells(measured) for measured in measurements]


def _cells(m: Measurement) -> tuple[str, ...]:
    others = [f"{name} {ratio:.2f}x" for name, ratio in m.speedups.items() if name != m.baseline]
    timed = [f"{name} {_amount(v, m.unit)}" for name, v in m.values.items() if name not in (OURS, *m.speedups)]
    over = f" over {m.baseline}" if m.speedup is not None else ""
    return (
        m.name,
        _amount(m.ours, m.unit),
        "" if m.bound is None else _amount(m.bound, m.unit),
        "" if m.share is None else f"{m.share:.0%}",
        "" if m.speedup is None else f"{m.speedup:.2f}x{over}",
        "" if m.promised is None else f"{m.promised:.2f}x",
        "" if m.promise is None else f"{m.promise:.2f}",
        ", ".join(others + timed),
    )


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def rich_table(measurements: Sequence[Measurement]) -> Table:
    """For a terminal: without the bound itself and without further rivals, which the page has."""
    columns = (0, 1, 3, 4, 5, 6)
    rows = [[row[column] for column in columns] for row in table_rows(measurements)]
    return table([HEAD[column] for column in columns], rows, "<" * len(columns), ruled=True)


def markdown(measurements: Sequence[Measurement], where: str) -> str:
    """The same as a markdown page, with the sizes and what could not be measured."""
    lines = [where, "", *markdown_table(HEAD, table_rows(measurements), "<" * len(HEAD)).splitlines()]
    sizes = [f"- `{m.name}`: {m.what}" for m in measurements]
    lines += ["", "Sizes:", "", *sizes]
    if profiled := [f"- `{m.name}`: {in_words(m.operators)}" for m in measurements if m.operators]:
        lines += ["", "Where our time goes:", "", *profiled]
    if missing := _missing(measurements):
        lines += ["", "Not measured:", "", *missing]
    return "\n".join(lines) + "\n"


def _missing(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each rival and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for measured in measurements:
        for rival, why in measured.missing.items():
            reasons.setdefault((rival, why), []).append(measured.name)
    return [
        f"- {rival}: {why} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for (rival, why), names in reasons.items()
    ]


def machine_line(device: str, precision: str, threads: int, ceiling: Ceiling) -> str:
    """What was measured on, its limits, and the jobs that ran or waited in the last minutes."""
    load = f"; load {os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{device}, {threads} threads, {precision}: matrix product {ceiling.flops / 1e9:,.0f} GFLOP/s, "
        f"copy {ceiling.bandwidth / 1e9:,.1f} GB/s{load}"
    )


def draw(stream: BinaryIO, measurements: Sequence[Measurement], title: str) -> bool:
    """Speed-ups over the baseline as bars, with what was promised as marks, into a PNG.

    False where matplotlib is not installed or there is nothing to draw.
    """
    shown = [m for m in measurements if m.speedup is not None]
    if not shown:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure: Any = Figure(figsize=(9, 0.24 * len(shown) + 1.6), layout="constrained")
    axis = figure.subplots()
    places = range(len(shown))
    axis.barh(places, [m.speedup for m in shown], height=0.7, color="#4c78a8", label="measured")
    promised = [(place, m.promised) for place, m in zip(places, shown, strict=True) if m.promised is not None]
    if promised:
        axis.scatter([p for _, p in promised], [place for place, _ in promised], marker="|", s=90, color="black",
                     label="promised", zorder=3)  # fmt: skip
    axis.axvline(1.0, color="#b03a2e", linewidth=0.8)
    axis.set_yticks(places, [f"{m.name}  / {m.baseline}" for m in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("times as fast, or as small, as the baseline")
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(title, fontsize=8)
    figure.savefig(stream, format="png", dpi=130)
    return True
