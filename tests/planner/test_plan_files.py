"""``harm.json`` of somebody else: what stands in it is data, and values that no measurement gives are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import config_of

from kncompress.anatomy.sites import anatomy_of
from kncompress.cli.presets import read_preset
from kncompress.errors import UserError
from kncompress.planner.budget import HarmTable, spend
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.plan_files import write_plan
from kncompress.planner.planning import read_harms


@pytest.fixture(scope="module")
def table() -> HarmTable:
    return unmeasured_table(anatomy_of(config_of("gpt2")), 40_000)


BREAKS = "a text\nstart: random\r\nmaps: {}\x85scalars: true\u2028depth: 1\u2029fit: {}\0end"


def test_a_text_with_line_breaks_adds_no_key_to_a_plan(table: HarmTable, tmp_path: Path) -> None:
    memory = {"start": "sequential", "data": {"source": BREAKS.replace("\0", "")}}
    plan = spend(replace(table, model=BREAKS, text=BREAKS, made_for=memory), 0.6)
    file = write_plan(tmp_path, plan, ["python", BREAKS])
    read = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert read == {"made_for": memory, "maps": plan.maps}
    assert read_preset("factors", file) == read


def spoiled(values: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    node: Any = values
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("parameters",), -1, "parameters=-1: must be greater than or equal to 0"),
        (("maps", 1, "options", 2, "parameters"), -5, r"maps\[1\]\.options\[2\]\.parameters=-5: must be greater"),
        (
            ("maps", 1, "options", 2, "parameters"),
            5,
            r"maps\[1\]\.options\[2\]\.parameters=5: layers.0.attn.q as .* has",
        ),
        (("maps", 1, "options", 2, "shape"), "1x1(x)1x1", r"maps\[1\]\.options\[2\]\.parameters=\d+: .* has 2"),
        (("maps", 1, "options", 2, "shape"), "keep\nmaps: {}", "not a Kronecker shape"),
        (("maps", 1, "options", 2, "error"), float("nan"), r"error=NaN: must be a finite number"),
        (("maps", 1, "options"), [], r"maps\[1\]\.options: keep is none of them"),
        (("maps", 1, "references"), [{"error": 0.1, "kl": 1e300}], r"maps\[1\]\.references\[0\]\.kl=1e\+300"),
        (("maps", 1, "name"), None, r"maps\[1\]\.name=null: must be a valid string"),
        (("maps", 1), "x", r"maps\[1\]=\"x\": must be"),
        (("exponent",), 1e308, r"exponent=1e\+308: must be less than or equal to 100"),
        (("together",), [[1, 2, 3]], r"together\[0\]"),
        (("format",), "?", r"format=\"\?\": must be 'kncompress harms 1'"),
        (("made_for",), [], r"made_for=\[\]: must be"),
    ],
)
def test_a_damaged_table_names_file_key_and_value(
    table: HarmTable, path: tuple[str | int, ...], value: Any, words: str, tmp_path: Path
) -> None:
    values = json.loads(json.dumps(table.as_dict()))
    (tmp_path / "harm.json").write_text(json.dumps(values))
    assert read_harms(tmp_path) == table
    (tmp_path / "harm.json").write_text(json.dumps(spoiled(values, path, value)))
    with pytest.raises(UserError, match=rf"^harm={tmp_path}: harm\.json: .*{words}") as caught:
        read_harms(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
