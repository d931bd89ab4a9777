"""What a training keeps in its run folder beside checkpoints and metrics: before the first step, and at its end."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from kncompress.commands.shrink import export_all
from kncompress.compression.compress import CompressionTable
from kncompress.config import TrainConfig
from kncompress.formats.card import CardFacts
from kncompress.formats.pretrained import save_model
from kncompress.reading import Number, read_json
from kncompress.reports.logged_run import LoggedRun
from kncompress.reports.wandb_content import compression_facts, log_maps, log_model, log_samples
from kncompress.runs.past_runs import COMPRESSION, SAMPLES
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text
from kncompress.training.loggers import log_facts
from kncompress.training.preparation import TrainingJob
from kncompress.training.samples import write_samples

START, REPAIR = "start.json", "repair.json"
"""What is measured before the first step, kept for a run that is resumed."""


def kept_table(file: Path) -> CompressionTable | None:
    """Of the student that the run began with, or None. Raises UserError where it is damaged."""
    return CompressionTable.read(file, f"resume={file.parent}") if file.exists() else None


def kept_repair(file: Path) -> dict[str, float]:
    """What block-wise repair did, or nothing. Raises UserError where the file is damaged."""
    return read_json(file, dict[str, Number], f"resume={file.parent}") if file.exists() else {}


def tell_start(
    config: TrainConfig, job: TrainingJob, run_dir: Path, loggers: Sequence[Logger], write: bool
) -> dict[str, float]:
    """Keep and log what is known before the first step; returns what the repair did."""
    _keep_table(job, run_dir / COMPRESSION, write)
    repair, maps = _repair_facts(job, run_dir / REPAIR, write), _maps(job)
    given = {} if config.student is None else {"compression/start": "student"}
    log_facts(loggers, compression_facts(config, job.facts, maps) | given | repair)
    log_maps(loggers, maps)
    return repair


def _maps(job: TrainingJob) -> list[dict[str, Any]]:
    """Every factored map's shape and error."""
    return [asdict(row) for row in job.compression.rows] if job.compression is not None else []


def _keep_table(job: TrainingJob, file: Path, write: bool) -> None:
    """Every map's shape and error in ``file``. A resumed run keeps the earlier file, since it knows nothing of the
    repair."""
    if write and job.compression is not None and not file.exists():
        write_text(file, job.compression.as_json())


def _repair_facts(job: TrainingJob, file: Path, write: bool) -> dict[str, float]:
    """What block-wise repair did, kept in ``file`` for a run that is resumed; nothing where there was none."""
    if job.compression is None or job.compression.repair is None:
        return kept_repair(file)
    facts = job.compression.repair.as_metrics()
    if write:
        write_text(file, json.dumps(facts))
    return facts


def keep_results(
    config: TrainConfig, job: TrainingJob, record: RunRecord, logged: LoggedRun, device: torch.device
) -> None:
    """The model, texts that it writes, and the record's end; a run can do without the texts and W&B's artifact."""
    run_dir, loggers = record.folder, logged.loggers
    facts = CardFacts(config.model.path, config.data.source, logged.metrics)
    model = save_model(job.student.cpu(), run_dir / "model", job.tokenizer, config.dtype, facts)
    with record.tolerating("samples"):
        _keep_samples(config, job, run_dir / SAMPLES, device, loggers)
    with record.tolerating("W&B artifact"):
        log_model(loggers if config.logger.artifact else [], model, run_dir / COMPRESSION, _maps(job), logged.metrics)
    export_all(config, record)
    record.finish("finished", logged.metrics, model)


def _keep_samples(
    config: TrainConfig, job: TrainingJob, file: Path, device: torch.device, loggers: Sequence[Logger]
) -> None:
    """What teacher and student write after a few prompts of the test split, where any are asked for."""
    if not config.samples.count:
        return
    teacher = None if job.teacher is None else job.teacher.to(device)
    rows = write_samples(teacher, job.student.to(device), job.test, job.tokenizer, config.samples)
    write_text(file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    log_samples(loggers, rows)
