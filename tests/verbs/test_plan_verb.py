"""``plan``: what it leaves, that ``compress`` takes it, that a second budget is cheap, and what it refuses."""

import json
import re
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
    assert re.search(r"\nplan needs \d\.\d GB of memory and \d\.\d GB of disk, about \d+ s on this machine\n", out)
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


def test_a_plan_remembers_its_fit_and_text(command: Any, words: list[str], tiny: Path, tmp_path: Path) -> None:
    """``compress`` makes what ``plan`` measured, with not a word on fit and text; words on either come first."""
    told = ["start=sequential", "fit.sides=inputs", "fit.sweeps=3", "data.text_format=lines", "calibration.context=32"]
    code, _, err = command("plan", *words, *told, "budget=0.6", "measure=false", "run_dir=planned")
    assert code == 0, err
    given = ["model=" + str(tiny), "factors=planned/plan.yaml"]
    kept = {"fit": {"sides": "inputs", "sweeps": 3}, "calibration": {"tokens": 1024, "context": 32}}
    memory = yaml.safe_load(Path("planned/plan.yaml").read_text())["made_for"]
    source = next(word for word in words if word.startswith("data.source=")).partition("=")[2]
    assert memory == {"start": "sequential", **kept, "data": {"source": source, "text_format": "lines"}}

    code, _, err = command("compress", *given, "run_dir=made")
    assert code == 0, err
    config = yaml.safe_load(Path("made/config.yaml").read_text())
    assert config["start"] == "sequential" and config["data"]["source"] == source
    assert config["data"]["text_format"] == "lines"
    for section, values in kept.items():
        assert {key: config[section][key] for key in values} == values

    code, _, err = command("compress", *given, "start=calibrated", "fit.sides=both", "data=sample", "run_dir=other")
    assert code == 0, err
    config = yaml.safe_load(Path("other/config.yaml").read_text())
    assert (config["start"], config["fit"]["sides"], config["fit"]["sweeps"]) == ("calibrated", "both", 3)
    assert config["data"]["source"] == "sample" and config["data"]["text_format"] == "auto"

    code, _, err = command("plan", f"model={tiny}", "harm=planned", "budget=0.8", "run_dir=second")
    assert code == 0, err
    assert yaml.safe_load(Path("second/plan.yaml").read_text())["made_for"] == memory


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("{model: asset:mini}", "factors.made_for.model: unknown key"),
        ("{fit: 3}", "factors.made_for.fit=3: must be keys"),
        ("{start: {a: 1}}", "factors.made_for.start"),
        ("{fit: {sides: neither}}", "fit.sides=neither"),
        ("{fit: {side: both}}", "fit.side: unknown key"),
        ("{data: {source: absent.txt}}", "data.source=absent.txt"),
        ("{calibration: {tokens: [1]}}", "calibration.tokens"),
    ],
)
def test_what_a_plan_says_is_checked(command: Any, tiny: Path, memory: str, said: str) -> None:
    Path("plan.yaml").write_text(f"made_for: {memory}\nmaps: {{layers.0.mlp.up: keep}}\n")
    code, _, err = command("compress", f"model={tiny}", "factors=plan.yaml", "start=calibrated", "run_dir=made")
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not Path("made").exists()


def test_a_plan_that_finds_no_room_is_refused_before_anything_is_written(
    command: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kncompress.compression.forecast.available_memory", lambda: 10**8)
    code, _, err = command("plan", *words, "run_dir=run")
    assert code == 2 and err.startswith("kncompress: model: 0.1 GB of memory are free, and plan needs ")
    assert err.count("\n") == 1 and not Path("run").exists()
