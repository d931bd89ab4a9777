"""The page of ``report``: one HTML file that needs neither server nor network; plotly's pictures embed themselves."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kncompress.evaluation.comparison import ANCHORS
from kncompress.reports.figures import Points, curves_figure, maps_figure, pareto_figure
from kncompress.runs.past_runs import Run

_COLUMNS = (
    "parameters/student",
    "parameters",
    "perplexity/student",
    "perplexity",
    "perplexity/start",
    "kl/student",
    "compare/kl_median",
    "compare/kl_99",
    "compare/same_top",
    "compare/log_ppl_ratio",
    "unseen/perplexity/student",
    "unseen/perplexity/teacher",
    "unseen/kl/student",
    "error/mean",
    "error/weighted",
)
_NO_TERMS = ("train/loss", "train/tokens", "train/tokens_per_second")


def report_page(runs: Sequence[Run], title: str, baselines: Mapping[str, Sequence[float]] | None = None) -> str:
    """The page.

    Args:
        runs: runs of any verb; a part of the page that none has anything for is left out.
        baselines: ``{name: [unique parameters, perplexity]}`` of models measured elsewhere, on the same text.

    Returns:
        HTML. Its element ``runs`` holds the numbers of the table as JSON.
    """
    library = iter([True])  # five megabytes, once
    figures = [
        (name, heading, figure.to_html(full_html=False, include_plotlyjs=next(library, False), div_id=name))
        for name, heading, figure in _figures(runs, baselines or {})
    ]
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        title=title,
        figures=figures,
        headlines=_headlines(runs),
        anchors=[f"{name}: KL {kl:g}, {same:g}%" for name, kl, same in ANCHORS] if _compared(runs) else [],
        texts=_texts(runs),
        runs=_table(runs),
        samples=_samples(runs),
        origins=[(run.name, _origin(run)) for run in runs],
        numbers=[{"name": run.name, "status": run.status, "metrics": run.metrics} for run in runs],
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
    yield from _curves(runs)
    maps = {run.name: run.maps for run in runs if run.maps}
    if maps:
        yield "maps", "Shapes and errors of the maps at the start", maps_figure(maps)


def _curves(runs: Sequence[Run]) -> Iterator[tuple[str, str, Any]]:
    """Loss and perplexity of all runs against training tokens, where all have logged those, else against steps; and
    where there is one training run, the terms of its loss."""
    trained = [run for run in runs if run.curves]
    counted = all(run.curves.get("train/tokens") for run in trained)
    x = "training tokens" if counted else "step"

    def curves(metric: str) -> dict[str, Points]:
        found = {run.label: run.by_tokens(metric) if counted else run.curves.get(metric, []) for run in trained}
        return {name: curve for name, curve in found.items() if curve}

    if losses := curves("train/loss"):
        yield "loss-train", "Loss, train", curves_figure(losses, x, "loss")
    if len(trained) == 1:
        names = [name for name in trained[0].curves if name.startswith("train/") and name not in _NO_TERMS]
        terms = {name.removeprefix("train/"): next(iter(curves(name).values())) for name in names}
        if len(terms) > 1:
            yield "terms", "Loss by terms", curves_figure(terms, x, "nats, or squared difference", log=True)
    if scores := curves("validation/perplexity"):
        yield "perplexity-validation", "Perplexity, validation", curves_figure(scores, x, "perplexity", log=True)
    elif losses := curves("validation/loss"):
        yield "loss-validation", "Loss, validation", curves_figure(losses, x, "loss")
    if unseen := curves("unseen/perplexity"):
        yield "perplexity-unseen", "Perplexity, unseen text", curves_figure(unseen, x, "perplexity", log=True)


def _headlines(runs: Sequence[Run]) -> list[str]:
    """What each finished training has come to, in a line."""
    found = []
    for run in runs:
        if not (run.point and run.dense and run.status == "finished"):
            continue
        (parameters, perplexity), (whole, of_teacher) = run.point, run.dense
        start, closed = run.metrics.get("perplexity/start"), run.metrics.get("gap_closed")
        kl, same = run.metrics.get("kl/student"), run.metrics.get("compare/same_top")
        speed = run.metrics.get("tokens_per_second")
        parts = [
            f"{whole:,.0f} → {parameters:,.0f} parameters ({parameters / whole:.1%})",
            f"perplexity {f'{start:,.2f} → ' if start else ''}{perplexity:,.2f} (dense {of_teacher:,.2f})",
            f"{closed:.0%} of the gap closed" if closed is not None else "",
            f"KL {kl:.3f}" if kl is not None else "",
            f"same likeliest token {same:.1f}%" if same is not None else "",
            f"trained at {speed:,.0f} tokens/s" if speed else "",
        ]
        found.append(f"{run.label}: {', '.join(part for part in parts if part)}")
    return found


def _texts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{what perplexities were measured on: the runs}, since those on different texts say nothing about each other."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.text and (run.point or run.measured):
            found.setdefault(run.text, []).append(run.name)
    return found


def _compared(runs: Sequence[Run]) -> bool:
    return any("compare/same_top" in run.metrics for run in runs)


def _table(runs: Sequence[Run]) -> list[list[str]]:
    columns = [name for name in _COLUMNS if any(run.metrics.get(name) is not None for run in runs)]
    lines = [
        [run.name, run.verb, run.status, *(_cell(run.metrics.get(name)) for name in columns), run.differs]
        for run in runs
    ]
    return [["run", "verb", "status", *columns, "what differs"], *lines]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _samples(runs: Sequence[Run]) -> list[list[list[str]]]:
    """Tables with a column a prompt: the text itself, the dense model, and every run that had the same prompts."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.samples:
            groups.setdefault(tuple(row["prompt"] for row in run.samples), []).append(run)
    tables = []
    for prompts, members in groups.items():
        dense = dict.fromkeys(tuple(row.get("teacher", "") for row in run.samples) for run in members)
        tables.append([
            ["", *(f"{prompt} …" for prompt in prompts)],
            ["the text itself", *(row.get("text", "") for row in members[0].samples)],
            *(["dense", *texts] for texts in dense if any(texts)),
            *([run.name, *(row.get("student", "") for row in run.samples)] for run in members),
        ])  # fmt: skip
    return tables


def _origin(run: Run) -> str:
    kept = ("git", "machine", "versions", "started", "wall_seconds", "error")
    about = json.dumps({key: run.record[key] for key in kept if run.record.get(key) is not None}, indent=2)
    return f"{run.command}\n\n{about}"
