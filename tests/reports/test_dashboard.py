"""The W&B workspace and report, checked by their models: every panel names what a real run logs."""

import json
import re
from typing import Any

import pytest

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed (extra dashboard)")

from kncompress.config import ObjectiveConfig
from kncompress.reports.dashboard import as_json, wandb_report, workspace

PARTS = ["Perplexity against parameters", "Loss terms", "Maps", "Sweep", "Samples"]


def by_type(panels: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for panel in panels:
        found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def check_panels(panels: list[dict[str, Any]]) -> None:
    found = by_type(panels)
    (scatter,) = found["Scatter Plot"]
    assert scatter["xAxis"] == "summary:parameters/student" and scatter["yAxis"] == "summary:perplexity/student"
    assert scatter["yAxisLogScale"] is True and scatter["showMinYAxisLine"] is True
    lines = [line["metrics"] for line in found["Run History Line Plot"]]
    assert lines == [["validation/perplexity"], *([f"train/{name}"] for name in ("loss", *ObjectiveConfig.TERMS))]
    assert {line["xAxis"] for line in found["Run History Line Plot"]} == {"trainer/global_step"}
    (coordinates,) = found["Parallel Coordinates Plot"]
    columns = [column["accessor"] for column in coordinates["columns"]]
    assert {"config:compression/factors.value", "config:compression/terms.value"} <= set(columns)
    assert columns[-2:] == ["summary:parameters/student", "summary:perplexity/student"]
    assert found["Media Browser"][0]["mediaKeys"] == ["maps_picture"]
    assert found["Run Comparer"] and found["Bar Chart"]
    tables = re.findall(r'"val": "(maps|samples)"', json.dumps(found["Weave"]))
    assert tables == ["maps", "samples"]


def test_the_workspace_has_every_part() -> None:
    view = json.loads(as_json(workspace("team", "shapes", "Compression")))
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "shapes", "Compression")
    section = view["spec"]["section"]
    parts = section["panelBankConfig"]["sections"]
    assert [part["name"] for part in parts if part["panels"]] == PARTS
    check_panels([panel for part in parts for panel in part["panels"]])
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group"]
    assert runs["runFeed"]["columnPinned"]["config:compression/ratio.value"] is True


def test_the_report_has_every_part() -> None:
    view = json.loads(as_json(wandb_report("team", "shapes", "Compression")))
    assert view["project"] == {"name": "shapes", "entityName": "team"} and view["displayName"] == "Compression"
    blocks = view["spec"]["blocks"]
    assert [block["children"][0]["text"] for block in blocks if block["type"] == "heading"] == PARTS
    grids = [block["metadata"]["panelBankSectionConfig"]["panels"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == len(PARTS)
    check_panels([panel for grid in grids for panel in grid])
