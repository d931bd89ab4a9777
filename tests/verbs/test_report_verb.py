"""``report``: the page of a real run, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest


def test_a_page_of_a_real_run(command: Any, small: list[str]) -> None:
    code, _, err = command("train", *small, "trainer.steps=1", "run_dir=runs/one")
    assert code == 0, err
    code, out, err = command("report", "run_dir=runs/page", "title=Mine", "baselines.other=[100,7.5]")
    assert code == 0, err
    assert "runs/page/report.html" in out
    page = Path("runs/page/report.html").read_text()
    (row,) = json.loads(re.search(r'<script type="application/json" id="runs">(.*?)</script>', page)[1])
    result = json.loads(Path("runs/one/result.json").read_text())
    assert row["metrics"] == result["metrics"] and "perplexity/student" in row["metrics"]
    for part in ("<h1>Mine</h1>", 'id="pareto"', 'id="loss-train"', 'id="maps"', 'class="samples"', "trainer.steps=1"):
        assert part in page, part
    # A report is no run to report on.
    assert command("report", "runs=runs", "run_dir=again")[0] == 0
    assert json.loads(Path("again/result.json").read_text())["metrics"] == {"runs": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=nowhere"], "runs=nowhere: no such folder"),
        (["runs=[]"], "runs=[]: must be a folder"),
        (["runs=.", "baselines.x=[1]"], "baselines.x=[1]: must be [unique parameters, perplexity]"),
        (["runs=."], "runs=.: no run in it"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command: Any, words: list[str], message: str) -> None:
    code, _, err = command("report", *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()
