"""``train``: teacher and text in, repaired student out."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from kncompress.config import TrainConfig
from kncompress.data.module import TextDataModule
from kncompress.data.sources import find_sources, read_split
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import TokenStream, token_stream
from kncompress.errors import UserError
from kncompress.metrics import Comparison, Perplexity, bits_per_byte, compare, perplexity
from kncompress.models.compress import CompressionReport, unique_parameters
from kncompress.models.plan import plan_from_config
from kncompress.models.pretrained import save_model
from kncompress.tasks.batches import BatchPlan, plan_batches
from kncompress.tasks.pretraining import ILKDPretraining
from kncompress.tasks.student import load_teacher, make_student, model_config, new_model
from kncompress.tasks.training import build_trainer, keep_freed_memory, quiet_lightning
from kncompress.tracking.checkpoints import BEST, LAST, BestCheckpoint, WholeFileCheckpointIO, checkpoint_callbacks
from kncompress.tracking.divergence import NonFiniteLoss
from kncompress.tracking.loggers import RewindMetrics, build_loggers, finish_loggers, log_facts
from kncompress.tracking.progress import TrainingProgress
from kncompress.tracking.record import RunRecord, outcome
from kncompress.tracking.summary import ModelScores, gap_closed, write_summary


def check(config: TrainConfig) -> None:
    """Cheap checks before anything is written: the text exists, the factors fit, an objective has its teacher."""
    for key in ("source", "validation", "test"):
        if getattr(config.data, key) is not None:
            find_sources(getattr(config.data, key), f"data.{key}", config.data.text_format)
    fields = model_config(config.model)
    if config.data.context is not None and config.data.context > fields.max_position_embeddings:
        raise UserError(f"data.context={config.data.context}: the model has {fields.max_position_embeddings} positions")
    plan_from_config(config.factors, fields)
    if config.model.path is None:
        _check_from_scratch(config)


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
        )
    ):
        raise UserError("factors: a model trained from scratch is dense; give factors=dense")


def run(config: TrainConfig, run_dir: Path) -> dict[str, float]:
    """Train in ``run_dir``; returns the metrics that ``result.json`` holds."""
    check(config)
    quiet_lightning()
    keep_freed_memory()
    with RunRecord.open(run_dir, "train", asdict(config), config.seed, config.resume is not None) as record:
        L.seed_everything(config.seed, verbose=False)
        job = prepare(config)
        loggers = build_loggers(config.logger, run_dir, record, asdict(config), run_dir.name, _sweep(run_dir))
        code = 1
        metrics: dict[str, float] = {}
        try:
            start = job.scores() if job.teacher is not None else None
            log_facts(loggers, job.facts)
            tokens_per_second = fit(config, job, run_dir, loggers)
            job.student.eval()
            metrics, rows = conclude(job, start, job.scores())
            metrics["tokens_per_second"] = tokens_per_second
            model = save_model(job.student, run_dir / "model", job.tokenizer, config.dtype)
            record.finish("finished", metrics, model)
            write_summary(run_dir, rows.get("teacher"), rows.get("start"), rows["student"])
            print(f"model: {model}", flush=True)
            code = 0
        except BaseException as error:
            code = outcome(error)[1]
            raise
        finally:
            finish_loggers(loggers, code, metrics)
    return metrics


@dataclass
class TrainingJob:
    """What a training run works with."""

    teacher: Any | None
    student: Any
    tokenizer: Any
    report: CompressionReport | None
    data: TextDataModule
    batches: BatchPlan
    test: TokenStream

    @property
    def facts(self) -> dict[str, float]:
        """What is known before the first step."""
        facts: dict[str, float] = {"parameters/student": unique_parameters(self.student)}
        if self.teacher is not None:
            facts["parameters/teacher"] = unique_parameters(self.teacher)
        if self.report is not None and self.report.mean_error is not None:
            facts["error/mean"] = self.report.mean_error
        return facts

    def scores(self) -> "Comparison | Perplexity":
        """Student, and where there is one the teacher, on the test split."""
        options: dict[str, Any] = {"ignore": ignored_token(self.tokenizer)}
        context = self.batches.context
        if self.teacher is None:
            return perplexity(self.student, self.test.tokens, context, **options)
        return compare(self.teacher, self.student, self.test.tokens, context, **options)


def prepare(config: TrainConfig) -> TrainingJob:
    """Teacher, student and text as the configuration asks for them."""
    teacher, report = None, None
    if config.model.path is None:
        student, tokenizer = new_model(config.model, read_split(config.data, "train"))
    else:
        teacher, tokenizer = load_teacher(config.model)
        student, report = make_student(teacher, config.factors, config.start)
    context = config.data.context or student.config.max_position_embeddings
    limit = config.trainer.validation_tokens
    data = TextDataModule(
        config.data, tokenizer, context, 1, 1, config.data.seed, math.ceil(limit / context) if limit else None
    )
    batches = plan_batches(config.trainer, context, len(data.blocks("train")))
    data.micro_batch, data.step_blocks = batches.micro_batch, batches.step_blocks
    data.blocks("validation")
    test = token_stream(config.data, "test", tokenizer)
    return TrainingJob(teacher, student, tokenizer, report, data, batches, test)


def fit(config: TrainConfig, job: TrainingJob, run_dir: Path, loggers: list[Any]) -> float:
    """Train the student in place, the weights that ``trainer.keep`` names in the end; tokens per second."""
    module = ILKDPretraining(
        job.student,
        job.teacher,
        config.objective,
        config.optimizer,
        job.batches.steps,
        config.trainer.dropout,
    )
    folder = run_dir / "checkpoints"
    callbacks = [
        *checkpoint_callbacks(run_dir, config.trainer.checkpoint_every),
        NonFiniteLoss(),
        RewindMetrics(),
        TrainingProgress(loss_is_cross_entropy=not config.objective.needs_teacher),
    ]
    trainer = build_trainer(config.trainer, job.batches, run_dir, callbacks, loggers, WholeFileCheckpointIO())
    resumed = folder / LAST if config.resume is not None and (folder / LAST).exists() else None
    trainer.fit(module, job.data, ckpt_path=resumed, weights_only=True)
    tokens_per_second = float(trainer.callback_metrics.get("train/tokens_per_second", math.nan))
    if config.trainer.keep == "best":
        _keep_best(trainer, module, job, folder / BEST)
    module.close()
    return tokens_per_second


def _keep_best(trainer: L.Trainer, module: ILKDPretraining, job: TrainingJob, best: Path) -> None:
    """Back to the weights with the lowest validation loss; the last ones compete even where none was due for them."""
    if not best.exists():
        return
    last = trainer.validate(module, job.data, verbose=False)[0]["validation/loss"]
    scores = [c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)]
    if any(score is not None and float(score) < last for score in scores):
        checkpoint = torch.load(best, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])


def conclude(
    job: TrainingJob, start: "Comparison | Perplexity | None", end: "Comparison | Perplexity"
) -> tuple[dict[str, float], dict[str, ModelScores]]:
    """The metrics of ``result.json`` and the rows of the table, from the scores before and after training."""
    metrics = job.facts | {"tokens": job.batches.tokens, "steps": job.batches.steps}
    rows: dict[str, ModelScores] = {}
    if isinstance(start, Comparison) and isinstance(end, Comparison):
        rows["teacher"] = _row("teacher", metrics["parameters/teacher"], start.teacher, job.test)
        rows["start"] = _row("student at the start", metrics["parameters/student"], start.student, job.test, start.kl)
        rows["student"] = _row("student, trained", metrics["parameters/student"], end.student, job.test, end.kl)
        metrics |= {"kl/start": start.kl, "kl/student": end.kl}
        share = gap_closed(*rows.values())
        if share is not None:
            metrics["gap_closed"] = share
    else:
        assert isinstance(end, Perplexity)
        rows["student"] = _row("model, trained", metrics["parameters/student"], end, job.test)
    for name, row in rows.items():
        assert row.perplexity is not None and row.bits_per_byte is not None
        metrics |= {f"perplexity/{name}": row.perplexity, f"bits_per_byte/{name}": row.bits_per_byte}
    return metrics, rows


def _row(name: str, parameters: float, score: Perplexity, text: TokenStream, kl: float | None = None) -> ModelScores:
    # The few tokens that no window scores count as the mean of the others.
    bits = bits_per_byte(score.nll * len(text), text.text_bytes)
    return ModelScores(name, int(parameters), score.perplexity, kl, bits)


def _sweep(run_dir: Path) -> str | None:
    """Name of the sweep's folder where this run is a job of one."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return run_dir.parent.name if in_sweep else None
