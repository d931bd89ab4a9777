"""``inspect``: sizes and costs of a model and its student, from the configuration alone; no weights are read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kncompress.cli.presets import config_folder, options, read_factors
from kncompress.compression.compress import CompressionTable
from kncompress.compression.forecast import forecast
from kncompress.compression.inspection import Inspection, inspect_config, predict, totals
from kncompress.compression.inspection_table import inspection_text, preset_text
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import CompressConfig, InspectConfig
from kncompress.errors import UserError
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text
from kncompress.training.student import model_config


def check(config: InspectConfig) -> Inspection:
    """Before anything is written: there is such a configuration and the factors fit it; returns what comes of them."""
    fields = model_config(config.model)
    plan = StudentPlan.of(config.factors, fields)
    return inspect_config(fields, plan.maps, plan.layers)


def run(config: InspectConfig, run_dir: Path, inspection: Inspection) -> dict[str, float]:
    """Inspect; ``run_dir`` gets ``inspect.txt`` and ``inspect.json``. Returns the metrics of ``result.json``."""
    with RunRecord.open(run_dir, "inspect", asdict(config), config.seed) as record:
        fields = model_config(config.model)
        presets, needs = _presets(fields), _needs(config, fields)
        told = "\n".join(f"compress start={start:<11} {line}" for start, line in needs.items())
        shown = f"{inspection_text(inspection, config.every_map)}\n\n{told}\n\n{preset_text(presets)}\n"
        values = inspection.as_dict() | {
            "presets": {name: {"error": r} if isinstance(r, str) else totals(r) for name, r in presets.items()}
        }
        write_text(run_dir / "inspect.json", json.dumps(values, indent=2) + "\n")
        write_text(run_dir / "inspect.txt", shown)
        print(shown, end="")
        metrics: dict[str, float] = dict(inspection.totals)
        record.finish("finished", metrics)
    return metrics


def _needs(config: InspectConfig, fields: Any) -> dict[str, str]:
    """{start: what ``compress`` of the model would need}."""
    plan, found = StudentPlan.of(config.factors, fields), {}
    for start in ("nearest", "calibrated", "sequential"):
        asked = CompressConfig(model=config.model, factors=config.factors, start=start)
        needs = forecast(asked, fields, plan)
        found[start] = needs.line(needs.seconds())
    return found


def _presets(fields: Any) -> dict[str, CompressionTable | str]:
    """What each preset of the factors would make of the model, or in one line why it does not fit."""
    found: dict[str, CompressionTable | str] = {}
    for name in options("factors"):
        try:
            plan = StudentPlan.of(read_factors(config_folder() / "factors" / f"{name}.yaml"), fields)
            found[name] = predict(fields, plan.maps, plan.layers)
        except UserError as error:
            found[name] = str(error)
    return found
