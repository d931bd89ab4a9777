"""Cells of a GLUE suite: means, spreads and averages over tasks and seeds, also of a suite that is not finished."""

import json
from pathlib import Path

import pytest

from kncompress.errors import UserError
from kncompress.glue.cells import (
    Cell,
    averages,
    check_cells,
    read_cell,
    read_cells,
    suite_metrics,
    suite_table,
    write_cell,
)
from kncompress.glue.cells import write_suite as write


def cell(task: str, seed: int, who: str, **scores: float) -> Cell:
    return Cell(task, seed, who, scores, 1000, 12, 6, 1, 3, 2.0, 6.0, history=[{"train/loss": 1.0}])


CELLS = [
    cell("cola", 0, "teacher", matthews=0.5),
    cell("cola", 1, "teacher", matthews=0.3),
    cell("mrpc", 0, "teacher", f1=0.9, accuracy=0.7),
    cell("mrpc", 1, "teacher", f1=0.8, accuracy=0.8),
    cell("cola", 0, "student", matthews=0.1),
    cell("mrpc", 0, "student", f1=0.8, accuracy=0.6),
    cell("cola", 1, "student", matthews=0.2),  # its mrpc is still to come
]


def test_metrics_of_two_seeds() -> None:
    metrics = suite_metrics(CELLS)
    assert metrics["glue/cola/matthews/teacher"] == pytest.approx(0.4)
    assert metrics["glue/cola/matthews/teacher/std"] == pytest.approx(0.2 / 2**0.5)
    assert metrics["glue/average/teacher"] == pytest.approx((0.65 + 0.55) / 2)  # (.5 + .8) / 2 and (.3 + .8) / 2
    assert metrics["glue/average/teacher/std"] == pytest.approx(0.1 / 2**0.5)
    assert metrics["glue/average/student"] == pytest.approx(0.4) and "glue/average/student/std" not in metrics
    assert metrics["glue/mrpc/dev_examples"] == 6 and metrics["parameters/student"] == 1000


def test_an_average_needs_every_task() -> None:
    assert averages(CELLS, "student") == {0: pytest.approx(0.4)}
    assert averages(CELLS[:1] + CELLS[5:6], "student") == {}


def test_the_table_is_markdown_in_hundredths(tmp_path: Path) -> None:
    lines = suite_table(CELLS).splitlines()
    assert [part.strip() for part in lines[0].strip("|").split("|")] == [
        "model", "parameters", "cola matthews", "mrpc f1", "mrpc accuracy", "average",
    ]  # fmt: skip
    assert len({len(line) for line in lines[:4]}) == 1
    assert "40.00 ± 14.14" in lines[2] and lines[3].rstrip("| ").endswith("40.00")
    assert "-" in suite_table(CELLS[:1] + CELLS[5:6]).splitlines()[3].split("|")[-2]
    assert write(tmp_path, CELLS) == (tmp_path / "table.md").read_text()
    saved = json.loads((tmp_path / "table.json").read_text())
    assert len(saved["cells"]) == 7 and "history" not in saved["cells"][0] and saved["cells"][2]["score"] == 0.8


def test_cells_are_read_back(tmp_path: Path) -> None:
    for one in CELLS:
        write_cell(tmp_path, one)
    assert read_cell(tmp_path, "cola", 1, "teacher") == CELLS[1]
    assert read_cell(tmp_path, "mrpc", 1, "student") is None
    found = read_cells(tmp_path, ["cola", "mrpc"], [0, 1], ["teacher", "student"])
    assert sorted(map(repr, found)) == sorted(map(repr, CELLS))


def test_a_changed_cell_is_told(tmp_path: Path) -> None:
    for cell in CELLS:
        write_cell(tmp_path, cell)
    file = tmp_path / "cells" / "cola" / "seed1" / "teacher.json"
    whole = file.read_text()
    for changed in (whole.replace("matthews", "matthewt"), whole.replace('"seconds": ', '"seconds": 1')):
        assert changed != whole
        file.write_text(changed)
        with pytest.raises(UserError, match=r"seed1/teacher\.json is not as it was written; delete it"):
            check_cells(tmp_path)
    file.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "checksum"}))  # of an older version
    check_cells(tmp_path)


def test_a_damaged_cell_is_told_before_anything_is_written(tmp_path: Path) -> None:
    write_cell(tmp_path, CELLS[0])
    check_cells(tmp_path)
    file = tmp_path / "cells" / "cola" / "seed0" / "teacher.json"
    other = file.with_name("student.json")
    other.write_text(file.read_text())
    with pytest.raises(
        UserError, match=f"run_dir={tmp_path}: cells/cola/seed0/student.json is of cola, seed 0, teacher"
    ):
        check_cells(tmp_path)
    other.write_text("{")
    with pytest.raises(UserError, match=r"student\.json: is damaged"):
        check_cells(tmp_path)
