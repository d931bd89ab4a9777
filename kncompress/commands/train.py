"""``train``: teacher and text in, repaired student out."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from kncompress.anatomy.mapped import give_back_freed
from kncompress.commands.shrink import check_parts, outlook, planned, write_page
from kncompress.commands.train_kept import REPAIR, START, keep_results, kept_repair, kept_table, tell_start
from kncompress.commands.train_scores import conclude, score_unseen
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import check_calibration
from kncompress.config import FactorsConfig, TrainConfig
from kncompress.data.sources import find_sources, sources_of, without_own
from kncompress.data.tokens import default_context
from kncompress.errors import UserError
from kncompress.reports.logged_run import LoggedRun
from kncompress.reports.summary import write_summary
from kncompress.runs.past_runs import COMPRESSION
from kncompress.runs.process import process_rank
from kncompress.runs.record import RunRecord
from kncompress.runs.run_folder import check_contents
from kncompress.runs.whole_file import write_text
from kncompress.training.batches import blocks_of_a_step
from kncompress.training.checkpoints import (
    BEST,
    LAST,
    BestCheckpoint,
    WholeFileCheckpointIO,
    check_checkpoint,
    checkpoint_callbacks,
    read_checkpoint,
)
from kncompress.training.clock import TrainingClock
from kncompress.training.contents import contents
from kncompress.training.divergence import NonFiniteLoss
from kncompress.training.given_student import check_student
from kncompress.training.loggers import RewindMetrics
from kncompress.training.preparation import StartScores, TrainingJob, prepare, read_start_scores
from kncompress.training.pretraining import ILKDPretraining
from kncompress.training.processes import processes
from kncompress.training.progress import TrainingProgress
from kncompress.training.run_state import RunState
from kncompress.training.stopping import StopAtSignal
from kncompress.training.student import model_config, require_causal
from kncompress.training.trainer import build_trainer, keep_freed_memory, quiet_lightning, slow_bf16


def check(config: TrainConfig) -> StudentPlan:
    """Cheap checks before anything is written: text, factors, batch, devices, the checkpoint of a resumed run.

    Returns what becomes of the teacher.
    """
    for key in ("source", "validation", "test"):
        if getattr(config.data, key) is not None:
            sources_of(without_own(config.data), key)
    fields = model_config(config.model)
    require_causal(fields, "train")
    positions = fields.max_position_embeddings
    if config.data.context is not None and config.data.context > positions:
        raise UserError(f"data.context={config.data.context}: the model has {positions} positions")
    plan = StudentPlan.of(config.factors if config.student is None else FactorsConfig(), fields)
    if config.student is not None:
        _check_given(config, fields)
    check_parts(config)
    if config.unseen is not None:
        find_sources(config.unseen, "unseen")
    if config.needs_text:
        check_calibration(config.data, config.calibration, fields)
    blocks_of_a_step(config.trainer, config.data.context or default_context(positions), processes(config.trainer))
    objective = config.objective
    if config.trainer.strategy == "fsdp" and not (objective.cross_entropy or objective.logits or objective.hidden):
        raise UserError(
            "trainer.strategy=fsdp: needs a loss behind the last layer; give objective.cross_entropy, logits or hidden"
        )
    if config.model.path is None:
        _check_from_scratch(config)
    if config.resume is not None and config.run_dir is not None:
        _check_resumed(config, Path(config.run_dir))
    return plan


def _check_given(config: TrainConfig, teacher: Any) -> None:
    """Raises UserError where ``student`` cannot learn from the teacher with this config."""
    path = str(config.student)
    student = check_student(path, teacher, config.objective if config.objective.needs_teacher else None)
    require_causal(student, "train")
    context = config.data.context or default_context(teacher.max_position_embeddings)
    if student.max_position_embeddings < context:
        raise UserError(
            f"student={path}: has {student.max_position_embeddings} positions; give data.context of at most as many"
        )


def _check_resumed(config: TrainConfig, folder: Path) -> None:
    """Raises UserError where a file that the run goes on from is damaged, or what it reads has changed."""
    check_contents(folder, config, _contents(config))
    check_checkpoint(folder / "checkpoints" / LAST)
    read_start_scores(folder / START)
    kept_repair(folder / REPAIR)
    kept_table(folder / COMPRESSION)


def _contents(config: TrainConfig) -> dict[str, str]:
    return contents(config.model, config.data, {"student": config.student})


def _check_from_scratch(config: TrainConfig) -> None:
    if config.objective.needs_teacher:
        raise UserError("objective: compares with a teacher; a model from scratch takes objective=cross_entropy")
    if any(
        (
            config.factors.embedding,
            config.factors.qkv,
            config.factors.o,
            config.factors.mlp,
            config.factors.maps,
            config.factors.depth,
        )
    ):
        raise UserError("factors: a model trained from scratch is dense; give factors=dense")


def run(config: TrainConfig, run_dir: Path, plan: StudentPlan) -> dict[str, float]:
    """Train in ``run_dir``; returns the metrics that ``result.json`` holds. Every process of the run calls it."""
    quiet_lightning()
    keep_freed_memory()
    read = _contents(config) if process_rank() == 0 else None
    with RunRecord.open(
        run_dir, "train", asdict(config), config.seed, config.resume is not None, contents=read
    ) as record:
        L.seed_everything(config.seed, verbose=False)
        if record.writes and (slow := slow_bf16(config.trainer)) is not None:
            record.warn(slow)
        if config.budget is not None:
            print(outlook(config), flush=True)
            plan = planned(config, run_dir)
        goes_on = (run_dir / "checkpoints" / LAST).exists()
        job = prepare(config, plan, not goes_on, kept_table(run_dir / COMPRESSION) if goes_on else None)
        give_back_freed()  # plan and fit have other peaks than the training
        with LoggedRun(config, record, _sweep(run_dir), _presets()) as logged:
            start = StartScores(job, run_dir / START, lambda file, values: write_text(file, json.dumps(values)))
            clock = None if config.trainer.minutes is None else TrainingClock(config.trainer.minutes)
            callbacks = [start, RunState(config.seed, record.wandb_id), *([] if clock is None else [clock])]
            trainer = _trainer(config, job, run_dir, logged.loggers, callbacks, clock)
            logged.watch(trainer)
            repair = tell_start(config, job, run_dir, logged.loggers, trainer.is_global_zero)
            tokens_per_second = fit(config, job, run_dir, trainer, clock)
            job.batches = replace(job.batches, steps=trainer.global_step)
            metrics, rows = conclude(job, start.scores, job.scores(trainer))
            unseen, further = score_unseen(job, trainer)
            job.make_whole(trainer.is_global_zero)
            metrics |= unseen
            logged.metrics = metrics | repair | {"tokens_per_second": tokens_per_second}
            if trainer.is_global_zero:
                device = torch.device("cpu") if job.wholes else trainer.strategy.root_device
                keep_results(config, job, record, logged, device)
                write_summary(run_dir, rows.get("teacher"), rows.get("start"), rows["student"], further=further)
                if config.report:
                    write_page(record)
                print(f"model: {run_dir / 'model'}", flush=True)
    return logged.metrics


def _trainer(
    config: TrainConfig,
    job: TrainingJob,
    run_dir: Path,
    loggers: list[Any],
    callbacks: list[Any],
    clock: TrainingClock | None,
) -> L.Trainer:
    best, last = checkpoint_callbacks(run_dir, config.trainer.checkpoint_every)
    callbacks = [
        *callbacks,
        best,
        last,
        StopAtSignal(last),
        NonFiniteLoss(),
        RewindMetrics(),
        TrainingProgress(loss_is_cross_entropy=not config.objective.needs_teacher, clock=clock),
    ]
    return build_trainer(config.trainer, job.batches, run_dir, callbacks, loggers, WholeFileCheckpointIO())


def fit(
    config: TrainConfig,
    job: TrainingJob,
    run_dir: Path,
    trainer: L.Trainer,
    clock: TrainingClock | None,
) -> float:
    """Train the student, to the weights that ``trainer.keep`` names in the end; returns tokens per second."""
    length = job.batches.steps if clock is None else clock
    assert length is not None
    if config.trainer.teacher == "bf16" and job.teacher is not None:
        job.teacher.to(torch.bfloat16)
    if config.trainer.strategy == "fsdp":
        job.note_whole()
    module = ILKDPretraining(
        job.student,
        job.teacher,
        config.objective,
        config.optimizer,
        length,
        config.trainer.dropout,
        job.layers,
        job.cache,
        config.trainer.recompute,
    )
    folder = run_dir / "checkpoints"
    resumed = folder / LAST if (folder / LAST).exists() else None
    trainer.fit(module, job.data, ckpt_path=resumed, weights_only=True)
    # A run that is resumed at its end makes no step, and what follows would be logged under the last step but one.
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
    tokens_per_second = float(trainer.callback_metrics.get("train/tokens_per_second", math.nan))
    best = folder / BEST if config.trainer.keep == "best" and (folder / BEST).exists() else None
    if best is not None:
        _keep_best(trainer, module, job, best)
    module.close()
    job.student.eval()
    return tokens_per_second


def _keep_best(trainer: L.Trainer, module: ILKDPretraining, job: TrainingJob, best: Path) -> None:
    """Back to the weights with the lowest validation loss. The last ones are validated too, even where no validation
    was due."""
    last = trainer.validate(module, job.data, verbose=False)[0]["validation/loss"]
    scores = [c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)]
    if any(score is not None and float(score) < last for score in scores):
        trainer.strategy.load_model_state_dict(read_checkpoint(best))


def _sweep(run_dir: Path) -> str | None:
    """Name of the sweep's folder where this run is a job of one."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return run_dir.parent.name if in_sweep else None


def _presets() -> list[str]:
    """Names of the experiment and of the preset of factors; none where the run is resumed from its folder."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    chosen = [choices.get(group) for group in ("experiment", "factors")]
    return [str(name) for entry in chosen if entry for name in ([entry] if isinstance(entry, str) else entry)]
