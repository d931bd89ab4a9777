"""``inspect``: sizes and costs of a model and its student, from the configuration alone; no weights are read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kncompress.anatomy.plan import plan_from_config
from kncompress.cli.presets import config_folder, options, read_preset
from kncompress.compression.compress import CompressionReport
from kncompress.compression.inspection import inspect_config, predict, totals
from kncompress.compression.inspection_table import inspection_text, preset_text
from kncompress.config import FactorsConfig, InspectConfig
from kncompress.errors import UserError
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text
from kncompress.training.depth import student_config, student_layers
from kncompress.training.student import model_config


def check(config: InspectConfig) -> None:
    """Cheap checks before anything is written: there is such a configuration and the factors fit it."""
    _predicted(config.factors, model_config(config.model))


def run(config: InspectConfig, run_dir: Path) -> dict[str, float]:
    """Inspect; ``run_dir`` gets ``inspect.txt`` and ``inspect.json``. Returns the metrics of ``result.json``."""
    fields = model_config(config.model)
    plan = plan_from_config(config.factors, student_config(fields, config.factors))
    inspection = inspect_config(fields, plan, student_layers(config.factors, fields))
    with RunRecord.open(run_dir, "inspect", asdict(config), config.seed) as record:
        presets = _presets(fields)
        shown = f"{inspection_text(inspection, config.every_map)}\n\n{preset_text(presets)}\n"
        values = inspection.as_dict() | {
            "presets": {name: {"error": r} if isinstance(r, str) else totals(r) for name, r in presets.items()}
        }
        write_text(run_dir / "inspect.json", json.dumps(values, indent=2) + "\n")
        write_text(run_dir / "inspect.txt", shown)
        print(shown, end="")
        metrics: dict[str, float] = dict(inspection.totals)
        record.finish("finished", metrics)
    return metrics


def _predicted(factors: FactorsConfig, fields: Any) -> CompressionReport:
    plan = plan_from_config(factors, student_config(fields, factors))
    return predict(fields, plan, student_layers(factors, fields))


def _presets(fields: Any) -> dict[str, CompressionReport | str]:
    """What each preset of the factors would make of the model, or in one line why it does not fit."""
    found: dict[str, CompressionReport | str] = {}
    for name in options("factors"):
        values = read_preset("factors", config_folder() / "factors" / f"{name}.yaml")
        factors = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(FactorsConfig), values))
        assert isinstance(factors, FactorsConfig)
        try:
            found[name] = _predicted(factors, fields)
        except UserError as error:
            found[name] = str(error)
    return found
