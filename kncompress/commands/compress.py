"""``compress``: factor a model and save it, without training. Needs no text and no tokenizer."""

import time
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch

from kncompress.config import CompressConfig
from kncompress.errors import UserError
from kncompress.models.plan import plan_from_config
from kncompress.models.pretrained import save_model
from kncompress.tasks.depth import student_config
from kncompress.tasks.student import factor_, load_dense, model_config, tokenizer_if_any
from kncompress.tracking.record import RunRecord
from kncompress.tracking.whole_file import write_text


def check(config: CompressConfig) -> None:
    """Cheap checks before anything is written: the model exists and the factors fit it."""
    if config.model.path is None:
        raise UserError("model.path=null: compress needs a model that exists")
    plan_from_config(config.factors, student_config(model_config(config.model), config.factors))


def run(config: CompressConfig, run_dir: Path) -> dict[str, float]:
    """Factor in ``run_dir``: ``model/``, ``report.json`` and ``report.txt``; returns the metrics of ``result.json``."""
    check(config)
    with RunRecord.open(run_dir, "compress", asdict(config), config.seed) as record:
        L.seed_everything(config.seed, verbose=False)
        model = load_dense(config.model)
        began = time.perf_counter()
        report = factor_(model, config.factors, config.start)
        seconds = time.perf_counter() - began
        folder = save_model(model, run_dir / "model", tokenizer_if_any(config.model), getattr(torch, config.dtype))
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
        record.finish("finished", metrics, folder)
    return metrics
