"""Pictures of runs as figures of plotly, which embed their data: in the page of ``report``, and in W&B."""

from collections.abc import Mapping, Sequence
from typing import Any

from kncompress.anatomy.sites import place_of

Points = Sequence[tuple[float, float]]
_MARGIN = {"t": 20}
"""Pixels above a picture, which has its heading in the page."""
_NAMED = 12
"""Most runs whose names are written beside their points."""
_COARSE, _FINE = (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
"""Digits that a log scale over few powers of ten shows; the second where the largest value is near the least."""
_NEAR = 5.0
"""Their ratio up to which that is so."""


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points on the Pareto front, by rising first value: no other point is as good in all values and
    better in one."""

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def pareto_figure(
    runs: Sequence[tuple[str, tuple[float, float]]],
    dense: Points,
    baselines: Mapping[str, tuple[float, float]],
    labels: Mapping[str, str],
) -> Any:
    """Perplexity (log scale) against unique parameters.

    Args:
        runs: (name, (parameters, perplexity)) of every compressed model; a dotted line joins the front of them.
        dense: the same pair of the models that they were made from.
        baselines: other models, by name.
        labels: what a run's point says when it is pointed at, by the run's name.
    """
    from plotly import graph_objects as go

    points = [point for _, point in runs]
    front = [points[index] for index in pareto_front(points)]
    figure = go.Figure()
    line = {"shape": "hv", "dash": "dot", "color": "gray"}
    figure.add_scatter(**_xy(front), mode="lines", line=line, name="front", hoverinfo="skip")
    named = "markers+text" if len(runs) <= _NAMED else "markers"
    names = [name for name, _ in runs]
    shown = {"text": names, "textposition": "middle right", "hovertext": [labels[name] for name in names]}
    figure.add_scatter(**_xy(points), mode=named, name="runs", marker={"size": 9}, **shown)
    if dense:
        marker: dict[str, Any] = {"size": 13, "symbol": "star"}
        figure.add_scatter(**_xy(dense), mode="markers", name="dense", marker=marker)
    if baselines:
        marker = {"size": 10, "symbol": "diamond"}
        at, others = _xy(list(baselines.values())), list(baselines)
        figure.add_scatter(
            **at, mode="markers+text", text=others, textposition="top center", name="baselines", marker=marker
        )
    shown_values = [y for _, y in [*points, *dense, *baselines.values()]]
    axis = {"title": "perplexity", **_log_axis(shown_values)}
    return figure.update_layout(xaxis_title="unique parameters", yaxis=axis, margin=_MARGIN)


def curves_figure(curves: Mapping[str, Points], x: str, y: str, log: bool = False) -> Any:
    """One line a run, or a term of the loss.

    Args:
        curves: {name: (x, y) pairs}.
        x, y: what the axes show.
        log: whether the vertical axis has a log scale.
    """
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, curve in curves.items():
        figure.add_scatter(**_xy(curve), mode="lines+markers" if len(curve) < 30 else "lines", name=name)
    below = {"orientation": "h", "yanchor": "top", "y": -0.2}  # names of runs may be long
    axis = {"title": y, **(_log_axis([value for curve in curves.values() for _, value in curve]) if log else {})}
    return figure.update_layout(xaxis_title=x, yaxis=axis, showlegend=True, legend=below, margin=_MARGIN)


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A log scale for these values, over so few powers of ten that plain numbers read better."""
    above = [value for value in values if value > 0]
    digits = _FINE if above and max(above) <= _NEAR * min(above) else _COARSE
    ticks = [digit * 10.0**power for power in range(-5, 9) for digit in ((1, 3) if power < 0 else digits)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def maps_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Layers x maps of each run: the error on inputs, else of the weights, in colour; the shape in each cell.

    Args:
        runs: rows of a compression table by the run's name. One is shown, a menu chooses which.
    """
    from plotly import graph_objects as go

    rows = [row for maps in runs.values() for row in maps]
    key = "weighted" if any(row.get("weighted") is not None for row in rows) else "error"
    largest = max((row[key] for row in rows if row.get(key) is not None), default=1.0)
    bar = {"title": "error on inputs" if key == "weighted" else "error of the weights"}
    figure = go.Figure()
    for number, (name, maps) in enumerate(runs.items()):
        grid = _grid(maps, key)
        heat = go.Heatmap(**grid, texttemplate="%{text}", name=name, visible=number == 0, colorbar=bar)
        figure.add_trace(heat.update(colorscale="Viridis", zmin=0, zmax=largest))
    # Names of layers are numbers, but no quantities.
    figure.update_yaxes(type="category", title="layer", autorange="reversed")
    if len(runs) > 1:
        buttons = [
            {"label": name, "method": "restyle", "args": ["visible", [other == name for other in runs]]}
            for name in runs
        ]
        figure.update_layout(
            updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}]
        )
    layers = max(len(_grid(maps, key)["y"]) for maps in runs.values())
    return figure.update_layout(height=220 + 30 * layers, margin={"t": 20 if len(runs) == 1 else 80})


def _grid(maps: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    found = [(place_of(row["name"]), row) for row in maps]
    places = {("-" if place.layer is None else str(place.layer), place.kind): row for place, row in found}
    layers = list(dict.fromkeys(layer for layer, _ in places))
    kinds = list(dict.fromkeys(kind for _, kind in places))

    def cells(column: str) -> list[list[Any]]:
        return [[places.get((layer, kind), {}).get(column) for kind in kinds] for layer in layers]

    return {"z": cells(key), "x": kinds, "y": layers, "text": [[text or "" for text in row] for row in cells("shape")]}


def _xy(points: Points) -> dict[str, list[float]]:
    return {"x": [point[0] for point in points], "y": [point[1] for point in points]}
