"""``compress``: factor a model and save it, without training. Text and tokenizer are for the starts that calibrate."""

import time
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch

from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text, check_calibration, fit_progress
from kncompress.config import CompressConfig
from kncompress.errors import UserError
from kncompress.formats.card import CardFacts
from kncompress.formats.pretrained import save_model
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text
from kncompress.training.student import FitOptions, factor_, load_dense, load_teacher, model_config, tokenizer_if_any


def check(config: CompressConfig) -> StudentPlan:
    """Cheap checks before anything is written: the model exists and the factors fit it; returns what it becomes."""
    if config.model.path is None:
        raise UserError("model.path=null: compress needs a model that exists")
    fields = model_config(config.model)
    if config.needs_text:
        check_calibration(config.data, config.calibration, fields)
    return StudentPlan.of(config.factors, fields)


def run(config: CompressConfig, run_dir: Path) -> dict[str, float]:
    """Factor in ``run_dir``: ``model/``, ``report.json`` and ``report.txt``; returns the metrics of ``result.json``."""
    plan = check(config)
    with RunRecord.open(run_dir, "compress", asdict(config), config.seed) as record:
        L.seed_everything(config.seed, verbose=False)
        text = None
        if config.needs_text:
            model, tokenizer = load_teacher(config.model)
            text = calibration_text(config.data, config.calibration, model.config, tokenizer)
        else:
            model, tokenizer = load_dense(config.model), tokenizer_if_any(config.model)
        began = time.perf_counter()
        with fit_progress() as progress:
            report = factor_(model, plan, config.start, FitOptions(text, config.fit, config.repair, progress))
        seconds = time.perf_counter() - began
        data = config.data.source if text is not None else None
        facts = CardFacts(config.model.path, data, {"seconds/fit": seconds})
        folder = save_model(model, run_dir / "model", tokenizer, getattr(torch, config.dtype), facts)
        write_text(run_dir / "report.json", report.as_json())
        write_text(run_dir / "report.txt", report.table() + "\n")
        print(report.table())
        share = report.parameters_after / report.parameters_before
        print(
            f"\n{report.parameters_after:,} of {report.parameters_before:,} unique parameters ({share:.1%}): {folder}"
        )
        metrics: dict[str, float] = {
            "parameters/teacher": report.parameters_before,
            "parameters/student": report.parameters_after,
            "multiply_adds/teacher": report.multiply_adds_before,
            "multiply_adds/student": report.multiply_adds_after,
            "seconds/fit": seconds,
        }
        if report.mean_error is not None:
            metrics["error/mean"] = report.mean_error
        if report.weighted_error is not None:
            metrics["error/weighted"] = report.weighted_error
        if report.repair is not None:
            metrics |= report.repair.as_metrics()
        if text is not None:
            metrics |= {"seconds/moments": report.seconds_moments, "calibration/tokens": len(text.tokens)}
        record.finish("finished", metrics, folder)
    return metrics
