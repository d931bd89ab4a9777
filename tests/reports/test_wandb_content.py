"""Facts of hybrids and of dense models, and the picture of the maps where plotly is not installed."""

import json
from pathlib import Path

import pytest
from wandb_log import history, of_kind, offline_log

from kncompress.config import CalibrationConfig, LoggerConfig, TrainConfig
from kncompress.reports.wandb_content import compression_facts, log_maps
from kncompress.runs.record import RunRecord
from kncompress.training.loggers import build_loggers, finish_loggers

MAPS = [
    {"name": "layers.1.mlp.up", "shape": "576x1(x)1x1536*8 + s*288x1536(x)2x1", "error": 0.25},
    {"name": "layers.2.mlp.up", "shape": "288x1536(x)2x1*3", "error": 0.5},
]


def test_facts_of_hybrids_and_of_a_model_from_scratch():
    config = TrainConfig(start="calibrated", calibration=CalibrationConfig(tokens=99))
    assert compression_facts(config, {"parameters/student": 30, "parameters/teacher": 40}, MAPS) == {
        "parameters/student": 30,
        "parameters/teacher": 40,
        "compression/ratio": 0.75,
        "compression/factors": "1x1536*8 + 2x1 2x1*3",
        "compression/terms": 9,
        "compression/maps": 2,
        "compression/start": "calibrated",
        "compression/calibration_tokens": 99,
    }
    dense = compression_facts(TrainConfig(), {"parameters/student": 30}, [])
    assert dense["compression/factors"] == "dense" and dense["compression/terms"] == 0
    assert "compression/ratio" not in dense


def test_without_plotly_the_errors_are_a_bar_chart_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("kncompress.reports.wandb_content.find_spec", lambda name: None)
    with RunRecord.open(tmp_path, "train", {}, 0) as record:
        loggers = build_loggers(LoggerConfig(), tmp_path, record, {}, "job")
        log_maps(loggers, MAPS)
        finish_loggers(loggers, record, 0)
    log = offline_log(tmp_path)
    (row,) = history(log)
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['maps/path']}")
    assert [cells[4] for cells in json.loads(file.read_text())["data"]] == [0.25, 0.5]
    items = [item for entry in of_kind(log, "config") for item in entry.update]
    charts = [json.loads(item.value_json) for item in items if "visualize" in item.nested_key]
    panel = charts[-1]["panel_config"]  # W&B may write its configuration more than once
    assert panel["panelDefId"] == "wandb/bar/v0" and panel["fieldSettings"] == {"label": "name", "value": "error"}
