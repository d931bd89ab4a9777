"""What ``plan`` leaves: a plan that a person can read and edit, the same as numbers, and a picture."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kncompress.anatomy.sites import place_of
from kncompress.planner.budget import BudgetPlan
from kncompress.reading import one_line
from kncompress.runs.whole_file import replacing, write_text
from kncompress.terminal import text_table


def write_plan(folder: Path, plan: BudgetPlan, command: list[str]) -> Path:
    """Write ``plan.yaml``, which ``factors=<file>`` accepts, and ``plan.json``; returns the former."""
    table = plan.table
    notes = [
        f"{table.model}: {plan.parameters:,} of {table.parameters:,} unique parameters "
        f"({plan.parameters / table.parameters:.1%}), budget {plan.budget:,};",
        f"multiply-adds per token {plan.multiply_adds:,} of {table.multiply_adds:,} "
        f"({plan.multiply_adds / table.multiply_adds:.1%}).",
        f"Text: {table.text}.",
        f"Predicted KL {plan.kl:.4f} nats per token. After a map: its share of parameters, its KL by itself.",
        shlex.join(command),
        "Use: python -m kncompress compress factors=<this file>",
    ]
    if table.made_for:
        notes.append("made_for: fit and text, where the command says nothing else.")
    # A text may come from another's harm.json: within a comment it stays, in values the library quotes it.
    text = "".join(f"# {one_line(note)}\n" for note in notes)
    if table.made_for:
        text += yaml.safe_dump({"made_for": table.made_for}, sort_keys=False, allow_unicode=True)
    text += "maps:\n"
    for row in table.maps:
        chosen = plan.chosen[row.name]
        entry = yaml.safe_dump({row.name: chosen.shape}, width=2**20, allow_unicode=True).rstrip("\n")
        note = f"  # {chosen.parameters / row.parameters:.0%}, {plan.harms[row.name]:.5f}"
        text += f"  {entry}{'' if chosen.shape == 'keep' else note}\n"
    file = folder / "plan.yaml"
    write_text(file, text)
    write_text(folder / "plan.json", json.dumps(plan_values(plan), indent=2) + "\n")
    return file


def plan_values(plan: BudgetPlan) -> dict[str, Any]:
    """The plan as plain values."""
    rows = []
    for row in plan.table.maps:
        chosen = plan.chosen[row.name]
        rows.append(
            {
                "name": row.name,
                "shape": chosen.shape,
                "parameters": chosen.parameters,
                "dense_parameters": row.parameters,
                "multiply_adds": chosen.multiply_adds,
                "dense_multiply_adds": row.multiply_adds,
                "error": chosen.error,
                "kl": plan.harms[row.name],
            }
        )
    totals = {
        "budget": plan.budget,
        "parameters": plan.parameters,
        "dense_parameters": plan.table.parameters,
        "multiply_adds": plan.multiply_adds,
        "dense_multiply_adds": plan.table.multiply_adds,
        "kl_predicted": plan.kl,
        "kl_sum": sum(plan.harms.values()),
    }
    return totals | {"maps": rows}


def plan_table(plan: BudgetPlan) -> str:
    """For a terminal: a line for each kind of map, with shares of all layers from the lowest to the highest."""
    kinds: dict[str, list[str]] = {}
    for row in plan.table.maps:
        kinds.setdefault(place_of(row.name).kind, []).append(row.name)
    rows = {row.name: row for row in plan.table.maps}
    head = ("map", "maps", "kept", "parameters", "lowest", "highest", "multiply-adds", "error", "KL")
    cells: list[tuple[str, ...]] = []
    for kind, names in kinds.items():
        chosen = [plan.chosen[name] for name in names]
        dense = sum(rows[name].parameters for name in names)
        adds = sum(rows[name].multiply_adds for name in names)
        shares = [plan.chosen[name].parameters / rows[name].parameters for name in names]
        cells.append((
            kind, str(len(names)), str(sum(c.shape == "keep" for c in chosen)),
            f"{sum(c.parameters for c in chosen) / dense:.1%}", f"{min(shares):.1%}", f"{max(shares):.1%}",
            f"{sum(c.multiply_adds for c in chosen) / adds:.1%}" if adds else "-",
            f"{sum(c.error for c in chosen) / len(chosen):.3f}", f"{sum(plan.harms[name] for name in names):.4f}",
        ))  # fmt: skip
    return text_table(head, cells, "<>>>>>>>>")


def draw_plan(file: Path, plan: BudgetPlan) -> bool:
    """Layers x maps: share of the parameters kept, and weighted error. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = {row.name: row for row in plan.table.maps}
    inner = {name: place for name in rows if (place := place_of(name)).layer is not None}
    kinds = list(dict.fromkeys(place.kind for place in inner.values()))
    layers = 1 + max((place.layer or 0 for place in inner.values()), default=-1)
    figure = Figure(figsize=(0.8 * len(kinds) * 2 + 3, 0.22 * layers + 2.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (title, value) in zip(axes, _panels(plan, rows).items(), strict=True):
        grid = [[value(f"layers.{layer}.{kind}") for kind in kinds] for layer in range(layers)]
        shown = axis.imshow(grid, aspect="auto", vmin=0, vmax=1 if title.startswith("kept") else None, cmap="viridis")
        axis.set_xticks(range(len(kinds)), kinds, rotation=90)
        axis.set_ylabel("layer")
        ends = ", ".join(f"{name} {value(name):.0%}" for name in rows if name not in inner)
        axis.set_title(f"{title}\n{ends}", fontsize=9)
        figure.colorbar(shown, ax=axis)
    figure.suptitle(f"{plan.table.model}: {plan.parameters / plan.table.parameters:.1%} of the parameters", fontsize=10)
    with replacing(file) as stream:
        figure.savefig(stream, format="png", dpi=130)
    return True


def _panels(plan: BudgetPlan, rows: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kept share of parameters": lambda name: plan.chosen[name].parameters / rows[name].parameters,
        "weighted error": lambda name: plan.chosen[name].error,
    }


def command_line() -> list[str]:
    """The words that started this run, as a user would type them."""
    return ["python", "-m", "kncompress", *sys.argv[1:]]
