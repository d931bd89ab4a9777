"""The page of ``report``: one HTML file that needs neither server nor network; plotly's pictures embed themselves."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kncompress.reports.figures import curves_figure, maps_figure, pareto_figure
from kncompress.runs.past_runs import Run

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; vertical-align: top; }
#table td, #table th { text-align: right; } td:first-child, th:first-child { text-align: left !important; }
.samples td { min-width: 14em; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .5em; }
"""
_COLUMNS = (
    "parameters/student",
    "parameters",
    "perplexity/student",
    "perplexity",
    "perplexity/start",
    "kl/student",
    "error/mean",
    "error/weighted",
)


def report_page(runs: Sequence[Run], title: str, baselines: Mapping[str, Sequence[float]] | None = None) -> str:
    """The page.

    Args:
        runs: runs of any verb; a part of the page that none has anything for is left out.
        baselines: ``{name: [unique parameters, perplexity]}`` of models measured elsewhere, on the same text.

    Returns:
        HTML. Its element ``runs`` holds the numbers of the table as JSON.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    library = True
    for identity, heading, figure in _figures(runs, baselines or {}):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if identity == "pareto":
            parts.append(_texts(runs))
        parts.append(figure.to_html(full_html=False, include_plotlyjs=library, div_id=identity))
        library = False  # five megabytes, once
    parts += ["<h2>Runs</h2>", _table(runs), *_samples(runs)]
    parts += ["<h2>Environment and commands</h2>", *map(_origin, runs)]
    # "<" could end the element: a name may hold anything.
    numbers = json.dumps([{"name": run.name, "status": run.status, "metrics": run.metrics} for run in runs])
    data = numbers.replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="runs">{data}</script>')
    head = f'<meta charset="utf-8"><link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )


def _figures(runs: Sequence[Run], baselines: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, str, Any]]:
    """(id, heading, figure) of each picture that the runs have something for."""
    points = [(run.name, run.point) for run in runs if run.point]
    others = {name: (float(pair[0]), float(pair[1])) for name, pair in baselines.items()}
    others |= {run.name: run.measured for run in runs if run.measured}
    dense = sorted({run.dense for run in runs if run.dense})
    labels = {run.name: run.label for run in runs}
    if points or others:
        yield "pareto", "Perplexity against parameters", pareto_figure(points, dense, others, labels)
    for split in ("train", "validation"):
        curves = {run.label: run.curves[f"{split}/loss"] for run in runs if run.curves.get(f"{split}/loss")}
        if curves:
            yield f"loss-{split}", f"Loss, {split}", curves_figure(curves, "loss")
    maps = {run.name: run.maps for run in runs if run.maps}
    if maps:
        yield "maps", "Shapes and errors of the maps at the start", maps_figure(maps)


def _texts(runs: Sequence[Run]) -> str:
    """What the perplexities were measured on, since those on different texts say nothing about each other."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.text and (run.point or run.measured):
            found.setdefault(run.text, []).append(run.name)
    if len(found) == 1:
        return f"<p>Measured on {html.escape(next(iter(found)))}.</p>"
    lines = "".join(f"<li>{html.escape(text)}: {html.escape(', '.join(names))}</li>" for text, names in found.items())
    return f"<p><b>Measured on different texts, splits or windows:</b></p><ul>{lines}</ul>" if found else ""


def _table(runs: Sequence[Run]) -> str:
    columns = [name for name in _COLUMNS if any(run.metrics.get(name) is not None for run in runs)]
    lines = [
        [run.name, run.verb, run.status, *(_cell(run.metrics.get(name)) for name in columns), run.differs]
        for run in runs
    ]
    return _rows(["run", "verb", "status", *columns, "what differs"], lines, 'id="table"')


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]], attributes: str) -> str:
    rows = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    return f"<table {attributes}>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _samples(runs: Sequence[Run]) -> list[str]:
    """Tables with a column a prompt: the text itself, the dense model, and every run that had the same prompts."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.samples:
            groups.setdefault(tuple(row["prompt"] for row in run.samples), []).append(run)
    parts = ["<h2>Samples</h2>"] if groups else []
    for prompts, members in groups.items():
        lines = [["the text itself", *(row.get("text", "") for row in members[0].samples)]]
        dense = dict.fromkeys(tuple(row.get("teacher", "") for row in run.samples) for run in members)
        lines += [["dense", *texts] for texts in dense if any(texts)]
        lines += [[run.name, *(row.get("student", "") for row in run.samples)] for run in members]
        parts.append(_rows(["", *(f"{prompt} …" for prompt in prompts)], lines, 'class="samples"'))
    return parts


def _origin(run: Run) -> str:
    kept = ("git", "machine", "versions", "started", "wall_seconds", "error")
    about = json.dumps({key: run.record[key] for key in kept if run.record.get(key) is not None}, indent=2)
    text = f"{run.command}\n\n{about}"
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(text)}</pre></details>"
