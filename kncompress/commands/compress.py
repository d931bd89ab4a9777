"""``compress``: factor a model and save it, without training. Text and tokenizer are for the starts that calibrate."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import torch

from kncompress.compression.forecast import forecast
from kncompress.compression.parts import Parts
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text, check_calibration, fit_progress
from kncompress.config import CompressConfig
from kncompress.errors import UserError
from kncompress.formats.card import CardFacts
from kncompress.formats.pretrained import save_model
from kncompress.runs.record import RunRecord
from kncompress.runs.run_folder import begun_before, check_contents
from kncompress.runs.whole_file import write_text
from kncompress.training.contents import contents
from kncompress.training.student import (
    FitOptions,
    factor_,
    load_to_compress,
    load_to_fit,
    model_config,
    tokenizer_if_any,
)

PARTS = "parts"
"""Folder of a run that keeps the finished parts of the student until it is whole."""


def check(config: CompressConfig) -> StudentPlan:
    """Cheap checks before anything is written: the model exists and the factors fit it, and what a stopped run has read
    is there as it was; returns what it becomes."""
    if config.model.path is None:
        raise UserError("model.path=null: compress needs a model that exists")
    fields = model_config(config.model)
    if config.needs_text:
        check_calibration(config.data, config.calibration, fields)
    plan = StudentPlan.of(config.factors, fields)
    if config.run_dir is not None and begun_before(Path(config.run_dir), "compress"):
        check_contents(Path(config.run_dir), config, _contents(config), "run_dir")
    folder = Path(config.run_dir or "runs").expanduser()
    kept = sum(file.stat().st_size for file in (folder / PARTS).glob("*.safetensors"))
    forecast(config, fields, plan).check(folder, kept)
    return plan


def _contents(config: CompressConfig) -> dict[str, str]:
    """Hashes of the model and the text: parts that are kept are of these."""
    return contents(config.model, config.data if config.needs_text else None)


def run(config: CompressConfig, run_dir: Path, plan: StudentPlan) -> dict[str, float]:
    """Factor in ``run_dir``: ``model/``, ``compression.json`` and ``.txt``; returns the metrics of ``result.json``."""
    with RunRecord.open(run_dir, "compress", asdict(config), config.seed, contents=_contents(config)) as record:
        L.seed_everything(config.seed, verbose=False)
        needs = forecast(config, model_config(config.model), plan)
        print(f"compress {needs.line(needs.seconds())}", flush=True)
        text = None
        if config.needs_text:
            model, tokenizer, data = load_to_fit(config.model, config.data, run_dir / PARTS)
            text = replace(calibration_text(data, config.calibration, model.config, tokenizer), scratch=run_dir)
        else:
            model, tokenizer = load_to_compress(config.model, run_dir / PARTS), tokenizer_if_any(config.model)
        dtype = next(model.parameters()).dtype if config.dtype == "stored" else getattr(torch, config.dtype)
        parts = Parts(run_dir / PARTS, dtype)
        began = time.perf_counter()
        with fit_progress() as progress:
            table = factor_(model, plan, config.start, FitOptions(text, config.fit, config.repair, progress, parts))
        seconds = time.perf_counter() - began
        read = config.data.source if text is not None else None
        facts = CardFacts(config.model.path, read, {"seconds/fit": seconds})
        folder = save_model(model, run_dir / "model", tokenizer, dtype, facts, parts.files)
        parts.remove()
        write_text(run_dir / "compression.json", table.as_json())
        write_text(run_dir / "compression.txt", table.text() + "\n")
        print(table.text())
        share = table.parameters_after / table.parameters_before
        print(f"\n{table.parameters_after:,} of {table.parameters_before:,} unique parameters ({share:.1%}): {folder}")
        metrics: dict[str, float] = {
            "parameters/teacher": table.parameters_before,
            "parameters/student": table.parameters_after,
            "multiply_adds/teacher": table.multiply_adds_before,
            "multiply_adds/student": table.multiply_adds_after,
            "seconds/fit": seconds,
        }
        if table.mean_error is not None:
            metrics["error/mean"] = table.mean_error
        if table.weighted_error is not None:
            metrics["error/weighted"] = table.weighted_error
        if table.repair is not None:
            metrics |= table.repair.as_metrics()
        if text is not None:
            metrics |= {"seconds/moments": table.seconds_moments, "calibration/tokens": len(text.tokens)}
        record.finish("finished", metrics, folder)
    return metrics
