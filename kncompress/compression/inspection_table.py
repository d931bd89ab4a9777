"""An inspection as text: one line for equal maps, the totals, what the sides allow, what the presets would give."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kncompress.anatomy.sites import place_of
from kncompress.compression.compress import CompressionTable
from kncompress.compression.inspection import BYTES, InspectedMap, Inspection
from kncompress.terminal import text_table


def inspection_text(inspection: Inspection, every_map: bool = False) -> str:
    """Maps, totals and divisors; with ``every_map`` a line for each map, else equal maps of layers share one."""
    table = inspection.compression
    kept = "" if table.layers is None else f", the student keeps {number_list(table.layers)}"
    return "\n".join(
        [
            f"{inspection.model_type}, {inspection.teacher_layers} layers{kept}",
            "",
            _maps(inspection, every_map),
            "",
            _total("unique parameters", table.parameters_after, table.parameters_before),
            _total("multiply-adds per token", table.multiply_adds_after, table.multiply_adds_before),
            *(
                f"{f'bytes in {name}':<24} {size * table.parameters_after:>16,} of {size * table.parameters_before:,}"
                for name, size in BYTES.items()
            ),
            "",
            "Of a right factor [rows, columns] the rows divide the map's outputs, the columns its inputs:",
            *(f"{size:>9,}: {', '.join(map(str, found))}" for size, found in inspection.sides.items()),
        ]
    )


def preset_text(presets: Mapping[str, CompressionTable | str]) -> str:
    """What each preset would give: {name: the table, or why it does not fit}."""
    head = ("preset", "parameters", "share", "multiply-adds", "share")
    rows: list[tuple[str, ...]] = []
    for name, table in presets.items():
        if isinstance(table, CompressionTable):
            sides = (
                (table.parameters_after, table.parameters_before),
                (table.multiply_adds_after, table.multiply_adds_before),
            )
            rows.append((name, *(cell for part, whole in sides for cell in (f"{part:,}", f"{part / whole:.1%}"))))
        else:
            rows.append((name,))
    lines = text_table(head, rows, "<>>>>").splitlines()
    width = max(map(len, ("preset", *presets)))
    for number, found in enumerate(presets.values(), 1):
        if not isinstance(found, CompressionTable):
            lines[number] = f"{lines[number]:<{width}}  does not fit: {found}"
    return "\n".join(lines)


def grouped(maps: Sequence[InspectedMap]) -> list[tuple[str, int, InspectedMap]]:
    """Maps that differ in their layer alone, together: (name as ``layers.{1,3,5}.mlp.up``, how many, one of them)."""
    groups: dict[tuple[Any, ...], list[InspectedMap]] = defaultdict(list)
    for row in maps:
        groups[place_of(row.name).kind, row.out_features, row.in_features, row.shape].append(row)
    return [(_group_name(rows), len(rows), rows[0]) for rows in groups.values()]


def number_list(numbers: Sequence[int]) -> str:
    """Rising numbers in short: ``0-11``, ``1,3,...,29`` where the steps are equal, else ``0-2,5,9``."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]},...,{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _group_name(rows: Sequence[InspectedMap]) -> str:
    if len(rows) == 1:
        return rows[0].name
    numbers = [layer for row in rows if (layer := place_of(row.name).layer) is not None]
    return f"layers.{{{number_list(numbers)}}}.{place_of(rows[0].name).kind}"


def _maps(inspection: Inspection, every_map: bool) -> str:
    rows = [(row.name, 1, row) for row in inspection.maps] if every_map else grouped(inspection.maps)
    head = ("map", "maps", "out x in", "shape", "parameters of one", "dense", "multiply-adds of one", "dense")
    cells: list[tuple[str, ...]] = []
    for name, count, row in rows:
        numbers = (row.parameters, row.dense_parameters, row.multiply_adds, row.dense_multiply_adds)
        size = f"{row.out_features}x{row.in_features}"
        cells.append((name, str(count), size, row.shape, *(f"{n:,}" for n in numbers)))
    cells.append(("biases, norms, positions", "", "", "", f"{inspection.other_parameters:,}", "", "", ""))
    return text_table(head, cells, "<>><>>>>")


def _total(name: str, part: int, whole: int) -> str:
    return f"{name:<24} {part:>16,} of {whole:,} ({part / whole:.1%})"
