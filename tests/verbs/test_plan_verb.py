"""``plan``: what it leaves, that ``compress`` takes it, that a second budget is cheap, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from verbs.conftest import read


@pytest.fixture
def words(tiny: Path, text: Path, tmp_path: Path) -> list[str]:
    return [
        f"model={tiny}",
        f"data.source={text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "calibration.tokens=1024",
        "harm_tokens=128",
        "validation_tokens=128",
        "precision=fp32",
    ]


def test_a_plan_is_kept_measured_and_taken_by_compress(command: Any, words: list[str], tiny: Path, text: Path) -> None:
    code, out, err = command("plan", *words, "budget=0.6", "run_dir=planned")
    assert code == 0, err
    result = read(Path("planned"), "result.json")
    metrics = result["metrics"]
    assert (result["verb"], result["status"], result["plan"]) == ("plan", "finished", "plan.yaml")
    assert metrics["parameters/student"] <= 0.6 * metrics["parameters/teacher"]
    for name in ("multiply_adds/student", "kl/predicted", "kl/measured", "perplexity/teacher", "perplexity/student"):
        assert metrics[name] > 0, name
    for shown in ("embedding", "mlp.up", "multiply-adds", "predicted KL", "perplexity"):
        assert shown in out
    assert Path("planned/plan.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("planned").glob(".moments*"))

    written = Path("planned/plan.yaml").read_text()
    maps = yaml.safe_load(written)["maps"]
    assert len(maps) == 1 + 2 * 6 and written.startswith("#") and "budget=0.6" in written
    rows = read(Path("planned"), "plan.json")["maps"]
    assert {row["name"]: row["shape"] for row in rows} == maps

    code, _, err = command("compress", f"model={tiny}", "factors=planned/plan.yaml", "start=nearest", "run_dir=made")
    assert code == 0, err
    made = read(Path("made"), "result.json")["metrics"]
    for name in ("parameters/teacher", "parameters/student", "multiply_adds/teacher", "multiply_adds/student"):
        assert made[name] == metrics[name], name

    code, out, err = command("plan", f"model={tiny}", "harm=planned", "budget=0.8", "run_dir=second")
    assert code == 0, err
    second = read(Path("second"), "result.json")["metrics"]
    assert metrics["parameters/student"] < second["parameters/student"] <= 0.8 * metrics["parameters/teacher"]
    assert second["kl/predicted"] < metrics["kl/predicted"] and "kl/measured" not in second
    assert read(Path("second"), "harm.json") == read(Path("planned"), "harm.json")

    code, _, err = command("plan", "harm=planned", "run_dir=other")
    assert code == 2 and "harm=planned: is of another model" in err and not Path("other").exists()
    table = read(Path("planned"), "harm.json") | {"format": "?"}
    Path("planned/harm.json").write_text(json.dumps(table))
    code, _, err = command("plan", f"model={tiny}", "harm=planned", "run_dir=other")
    assert code == 2 and err.count("\n") == 1 and "harm=planned" in err


def test_no_picture_without_matplotlib(command: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command("plan", *words, "budget=2900", "speed=true", "measure=false", "run_dir=planned")
    assert code == 0, err
    assert "no picture" in out and not Path("planned/plan.png").exists()
    for row in read(Path("planned"), "plan.json")["maps"]:
        assert row["shape"] == "keep" or 1.3 * row["multiply_adds"] <= row["dense_multiply_adds"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("budget=0", "budget=0"),
        ("budget=-0.5", "budget=-0.5"),
        ("budget=0.01", "reach"),
        ("budget=10", "reach"),
        ("budget=1e9", "the model has"),
        ("harm=absent", "harm=absent: has no harm.json"),
        ("data.source=absent.txt", "data.source=absent.txt"),
        ("start=nearest", "start=nearest"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command: Any, words: list[str], given: str, said: str) -> None:
    code, _, err = command("plan", *words, given, "run_dir=planned")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not Path("planned").exists()
