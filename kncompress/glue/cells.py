"""The cells of a GLUE suite, one JSON file for each task, seed and model, and the tables made of them."""

import json
import math
import statistics
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.glue.scores import glue_average, task_score
from kncompress.reading import Number, read_json
from kncompress.runs.whole_file import write_text
from kncompress.terminal import markdown_table


@dataclass(frozen=True)
class Cell:
    """What one fine-tuned model scored on one task."""

    task: str
    seed: int
    who: str
    """``teacher``, ``student``, ``student_ilkd``, or the same of a baseline."""
    scores: dict[str, Number]
    """Dev scores of the best epoch, by metric, as shares."""
    parameters: int
    """Unique ones, with the head of the task."""
    train_examples: int
    dev_examples: int
    best_epoch: int
    steps: int
    seconds: float
    """Of training; for a teacher from the cache, of its training back then."""
    examples_per_second: float
    cached: bool = False
    """A teacher that an earlier run has fine-tuned."""
    history: list[dict[str, float]] = field(default_factory=list)
    checksum: int | None = None
    """In a file: of all the rest. Older files have none."""

    @property
    def score(self) -> float:
        """Mean of the metrics."""
        return task_score(self.scores.values())


def cell_file(folder: Path, task: str, seed: int, who: str) -> Path:
    """Where a cell lies in the run folder."""
    return folder / "cells" / task / f"seed{seed}" / f"{who}.json"


def write_cell(folder: Path, cell: Cell) -> None:
    """Write a finished cell: there whole or not at all."""
    file = cell_file(folder, cell.task, cell.seed, cell.who)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(cell)
    write_text(file, json.dumps(values | {"checksum": _checksum(values)}, indent=2, allow_nan=False) + "\n")


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in values.items() if k != "checksum"}, sort_keys=True).encode())


def read_cell(folder: Path, task: str, seed: int, who: str) -> Cell | None:
    """A finished cell, or None. Raises UserError where the file is damaged or of another cell."""
    file = cell_file(folder, task, seed, who)
    if not file.is_file():
        return None
    cell = read_json(file, Cell, f"run_dir={folder}")
    if cell.checksum not in (None, _checksum(json.loads(file.read_bytes()))):
        raise UserError(f"run_dir={folder}: {file.relative_to(folder)} is not as it was written; delete it")
    cell = replace(cell, checksum=None)
    if (cell.task, cell.seed, cell.who) != (task, seed, who):
        raise UserError(f"run_dir={folder}: {file.relative_to(folder)} is of {cell.task}, seed {cell.seed}, {cell.who}")
    return cell


def check_cells(folder: Path) -> None:
    """Raises UserError where a finished cell in a run folder is damaged, or lies in the place of another one."""
    for file in sorted(folder.glob("cells/*/seed*/*.json")):
        seed = file.parent.name.removeprefix("seed")
        if seed.isdecimal():
            read_cell(folder, file.parts[-3], int(seed), file.stem)


def read_cells(folder: Path, tasks: Iterable[str], seeds: Sequence[int], whos: Sequence[str]) -> list[Cell]:
    """Every finished cell of a suite, in the order of its table."""
    found = [read_cell(folder, task, seed, who) for task in tasks for seed in seeds for who in whos]
    return [cell for cell in found if cell is not None]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation over n - 1 where there are several values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def averages(cells: Sequence[Cell], who: str) -> dict[int, float]:
    """{seed: GLUE average} of one model, of seeds with a cell for each task of ``cells``."""
    tasks = {cell.task for cell in cells}
    scores: dict[int, dict[str, float]] = {}
    for cell in cells:
        if cell.who == who:
            scores.setdefault(cell.seed, {})[cell.task] = cell.score
    return {seed: glue_average(found) for seed, found in scores.items() if set(found) == tasks}


def suite_metrics(cells: Sequence[Cell]) -> dict[str, float]:
    """The metrics of ``result.json``: means over seeds, ``.../std`` beside them where there are several."""
    metrics: dict[str, float] = {}

    def put(name: str, values: Sequence[float]) -> None:
        mean, spread = mean_and_spread(values)
        metrics[name] = mean
        if spread is not None:
            metrics[f"{name}/std"] = spread

    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        for who in dict.fromkeys(cell.who for cell in own):
            mine = [cell for cell in own if cell.who == who]
            for metric in mine[0].scores:
                put(f"glue/{task}/{metric}/{who}", [cell.scores[metric] for cell in mine])
            metrics[f"glue/{task}/examples_per_second/{who}"] = statistics.fmean(c.examples_per_second for c in mine)
        metrics[f"glue/{task}/train_examples"] = own[0].train_examples
        metrics[f"glue/{task}/dev_examples"] = own[0].dev_examples
    for who in dict.fromkeys(cell.who for cell in cells):
        if found := averages(cells, who):
            put(f"glue/average/{who}", list(found.values()))
        metrics[f"parameters/{who}"] = max(cell.parameters for cell in cells if cell.who == who)
    return metrics


def suite_table(cells: Sequence[Cell]) -> str:
    """The suite as Markdown: a row for each model, a column for each metric, in hundredths, mean ± spread."""
    columns: dict[tuple[str, str], None] = {}
    for cell in cells:
        columns |= dict.fromkeys((cell.task, metric) for metric in cell.scores)
    head = ["model", "parameters", *(f"{task} {metric}" for task, metric in columns), "average"]
    lines = []
    for who in dict.fromkeys(cell.who for cell in cells):
        mine = [cell for cell in cells if cell.who == who]
        row = [who, f"{max(cell.parameters for cell in mine):,}"]
        for task, metric in columns:
            row.append(_figure([cell.scores[metric] for cell in mine if cell.task == task]))
        lines.append([*row, _figure(list(averages(cells, who).values()))])
    return markdown_table(head, lines, "<" + ">" * (len(head) - 1)) + "\n" + _notes(cells)


def _figure(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _notes(cells: Sequence[Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    sizes = {cell.task: f"{cell.task} {cell.train_examples:,} / {cell.dev_examples:,}" for cell in cells}
    return (
        f"Dev sets, best epoch by the mean of a task's metrics; mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}.\nExamples, training / dev: {'; '.join(sizes.values())}.\n"
        f"average: mean over {', '.join(sizes)} of the mean of each task's metrics; - where a cell is missing.\n"
    )


def write_suite(folder: Path, cells: Sequence[Cell]) -> str:
    """Write ``table.md`` and ``table.json`` (every cell without its history, and the means); returns the former."""
    text = suite_table(cells)
    values: Mapping[str, Any] = {
        "cells": [
            {k: v for k, v in asdict(cell).items() if k not in ("history", "checksum")} | {"score": cell.score}
            for cell in cells
        ],
        "metrics": {name: value for name, value in suite_metrics(cells).items() if math.isfinite(value)},
    }
    write_text(folder / "table.md", text)
    write_text(folder / "table.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    return text
