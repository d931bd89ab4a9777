"""The comparison at the end of a run."""

import io
import math

import pytest
from rich.console import Console

from kncompress.reports.summary import ModelScores, gap_closed, write_summary

TEACHER = ModelScores("teacher", 124_439_808, 24.67, 0.0, 0.9876)
START = ModelScores("student at the start", 83_907_530, 24594.314, 6.5, 2.5)
TRAINED = ModelScores("student, trained", 83_907_530, 32.81, 0.31234, 1.05)


def score(perplexity):
    return ModelScores("x", perplexity=perplexity)


@pytest.mark.parametrize(
    ("teacher", "start", "student", "share"),
    [
        (10.0, 1000.0, 100.0, 0.5),
        (10.0, 1000.0, 10.0, 1.0),
        (10.0, 100.0, 1000.0, -1.0),
        (10.0, 1000.0, 1.0, 1.5),
        (10.0, 10.0, 5.0, None),
        (10.0, 9.0, 8.0, None),
        (10.0, math.inf, 8.0, None),
        (10.0, 20.0, math.nan, None),
        (None, 20.0, 8.0, None),
    ],
)
def test_gap_closed(teacher, start, student, share):
    found = gap_closed(score(teacher), score(start), score(student))
    assert found == (share if share is None else pytest.approx(share))


def test_summary_text(tmp_path):
    terminal = io.StringIO()
    text = write_summary(tmp_path, TEACHER, START, TRAINED, Console(file=terminal, width=80))
    assert (tmp_path / "summary.txt").read_text() == text
    header, _, *lines, gap = text.splitlines()
    assert header.split("  ")[-1].strip() == "bits/byte"
    assert [line.split() for line in lines] == [
        ["teacher", "124,439,808", "100.0%", "24.67", "0.0000", "0.9876"],
        ["student", "at", "the", "start", "83,907,530", "67.4%", "24,594.31", "6.5000", "2.5000"],
        ["student,", "trained", "83,907,530", "67.4%", "32.81", "0.3123", "1.0500"],
    ]
    assert len({len(line) for line in lines}) == 1  # right-aligned figures end in one column
    closed = (math.log(24594.314) - math.log(32.81)) / (math.log(24594.314) - math.log(24.67))
    assert gap.endswith(f"closed: {closed:.1%}")
    for part in ("24,594.31", "124,439,808", "bits/byte", gap.strip()):
        assert part in terminal.getvalue()  # nothing is cut off at 80 columns


def test_columns_without_a_value_are_left_out(tmp_path):
    text = write_summary(tmp_path, None, None, ModelScores("model", 10, 3.0), Console(file=io.StringIO()))
    assert "KL" not in text and "bits" not in text and "gap" not in text
    assert text.splitlines()[-1].split() == ["model", "10", "100.0%", "3.00"]


def test_missing_figures_and_a_start_without_a_gap(tmp_path):
    start = ModelScores("student at start", None, 20.0)
    text = write_summary(tmp_path, TEACHER, start, TRAINED, Console(file=io.StringIO()))
    (row,) = [line.split() for line in text.splitlines() if "start" in line]
    assert row == ["student", "at", "start", "-", "-", "20.00", "-", "-"]
    assert text.splitlines()[-1].endswith("none to close, or not measurable")
