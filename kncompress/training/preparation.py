"""What a training run works with: teacher, student, text and batches, and how the models score."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kncompress.compression.compress import CompressionTable, unique_parameters
from kncompress.compression.own_text import with_own_text
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text, fit_progress
from kncompress.config import DataConfig, TrainConfig
from kncompress.data.module import TextDataModule
from kncompress.data.sources import fingerprint, read_split
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import (
    TokenStream,
    default_context,
    tell_default_context,
    token_stream,
    tokenizer_fingerprint,
)
from kncompress.evaluation import Comparison, Perplexity, compare, perplexity
from kncompress.reading import read_json
from kncompress.runs.process import tell
from kncompress.training.batches import BatchPlan, plan_batches
from kncompress.training.contents import contents
from kncompress.training.given_student import load_student
from kncompress.training.processes import processes
from kncompress.training.sharding import Whole
from kncompress.training.student import FitOptions, load_teacher, make_student, new_model
from kncompress.training.teacher_cache import Facts, TeacherCache

Scores = Comparison | Perplexity


@dataclass
class TrainingJob:
    """What a training run works with."""

    teacher: Any | None
    student: Any
    tokenizer: Any
    compression: CompressionTable | None
    layers: tuple[int, ...] | None
    """Teacher layers that the student has kept; None: all."""
    data: TextDataModule
    batches: BatchPlan
    test: TokenStream
    test_tokens: int | None
    """Most tokens of the test split that are scored; None: all."""
    unseen: TokenStream | None = None
    """A text that nothing has read, scored too."""
    cache: TeacherCache | None = None
    """Draws that stand for the teacher's logits."""
    wholes: dict[str, Whole] = field(default_factory=dict)
    """What ``make_whole`` needs of the models that are going to be cut into shards."""

    def note_whole(self) -> None:
        """Call it before the models are cut."""
        models = {"teacher": self.teacher, "student": self.student}
        self.wholes = {name: Whole(model) for name, model in models.items() if model is not None}

    def make_whole(self, first: bool) -> None:
        """Models that were cut into shards become whole ones on the CPU of the ``first`` process; all call it together.

        The other processes have no use for theirs any more.
        """
        for name, whole in self.wholes.items():
            setattr(self, name, whole.of(getattr(self, name), keep=first))

    @property
    def facts(self) -> dict[str, float]:
        """What is known before the first step."""
        facts: dict[str, float] = {"parameters/student": unique_parameters(self.student)}
        if self.teacher is not None:
            facts["parameters/teacher"] = unique_parameters(self.teacher)
        if self.compression is not None and self.compression.mean_error is not None:
            facts["error/mean"] = self.compression.mean_error
        if self.compression is not None and self.compression.weighted_error is not None:
            facts["error/weighted"] = self.compression.weighted_error
        return facts

    def scores(self, trainer: L.Trainer, text: TokenStream | None = None) -> Scores:
        """Student, and where there is one the teacher, on a text, or else the test split; every process scores its
        share."""
        text = text or self.test
        options: dict[str, Any] = {
            "ignore": ignored_token(self.tokenizer),
            "first": text.first,
            "limit": self.test_tokens,
            "rank": trainer.global_rank,
            "world": trainer.world_size,
        }
        device, context = trainer.strategy.root_device, self.batches.context
        student = self.student.to(device)
        if self.teacher is None:
            return perplexity(student, text.tokens, context, **options)
        return compare(self.teacher.to(device), student, text.tokens, context, **options)


@dataclass
class _Models:
    teacher: Any | None
    student: Any
    tokenizer: Any
    data: DataConfig
    compression: CompressionTable | None = None


def _models(
    config: TrainConfig, plan: StudentPlan, start: str, repair: bool, made: CompressionTable | None = None
) -> _Models:
    """Teacher and student, and what they read; a model from scratch has no teacher."""
    if config.model.path is None:
        student, tokenizer = new_model(config.model, read_split(config.data, "train"))
        return _Models(None, student, tokenizer, config.data)
    teacher, tokenizer = load_teacher(config.model)
    data, text = with_own_text(config.data, teacher, tokenizer), None
    if config.student is not None:
        student, table = load_student(config.student, teacher)
        return _Models(teacher, student, tokenizer, data, table)
    if made is None and start != "random" and (config.needs_text if repair else config.start_reads_text):
        text = calibration_text(data, config.calibration, teacher.config, tokenizer)
    with fit_progress() as progress:
        fit = FitOptions(text, config.fit, config.repair if repair else None, progress)
        student, table = make_student(teacher, plan, start, fit, made)
    return _Models(teacher, student, tokenizer, data, table)


def prepare(
    config: TrainConfig, plan: StudentPlan, repair: bool = True, made: CompressionTable | None = None
) -> TrainingJob:
    """Teacher, student and text as the configuration asks for them.

    Args:
        plan: what becomes of the teacher.
        repair: False for a run that goes on from a checkpoint, whose weights come after any repair.
        made: table of the student whose weights that checkpoint has; None: the student is fitted.
    """
    models = _models(config, plan, config.start, repair, made)
    student, tokenizer = models.student, models.tokenizer
    positions = student.config.max_position_embeddings
    context = config.data.context or default_context(positions)
    if config.data.context is None:
        tell_default_context("data.context", positions)
    limit = config.trainer.validation_tokens
    unseen = token_stream(_unseen_text(config), "auto", tokenizer) if config.unseen is not None else None
    data = TextDataModule(
        models.data, tokenizer, context, 1, 1, config.data.seed, math.ceil(limit / context) if limit else None,
        numbered=config.objective.cache is not None, unseen=unseen,
    )  # fmt: skip
    batches = plan_batches(config.trainer, context, len(data.blocks("train")), processes(config.trainer))
    data.micro_batch, data.step_blocks = batches.micro_batch, batches.step_blocks
    data.blocks("validation")
    test = token_stream(models.data, "test", tokenizer)
    limit, cache = config.trainer.test_tokens, None
    if config.objective.cache is not None:
        cache = TeacherCache(Path(config.objective.cache), cache_facts(config, models, context))
        tell(cache.outlook())
    layers = plan.layers if models.compression is None else models.compression.layers
    return TrainingJob(
        models.teacher, student, tokenizer, models.compression, layers, data, batches, test, limit, unseen, cache
    )


def _unseen_text(config: TrainConfig) -> DataConfig:
    """The source of ``unseen``: its test split where it names one, the whole of it otherwise."""
    return replace(config.data, source=config.unseen, validation=None, test=None, column=None, text_format="auto")


def cache_facts(config: TrainConfig, models: _Models, context: int) -> Facts:
    """What the draws of ``objective.cache`` must be of."""
    stream = token_stream(models.data, "train", models.tokenizer)
    return Facts(
        teacher=contents(config.model)["model.path"] + (":bf16" if config.trainer.teacher == "bf16" else ""),
        tokenizer=tokenizer_fingerprint(models.tokenizer),
        text=fingerprint(models.data, "train"),
        context=context,
        blocks=len(stream) // context,
        vocabulary=models.student.config.vocab_size,
        samples=config.objective.samples,
        temperature=config.objective.temperature,
        seed=config.seed,
    )


def read_start_scores(file: Path) -> Comparison | None:
    """What ``StartScores`` has kept, or None. Raises UserError where it is damaged."""
    return read_json(file, Comparison, f"resume={file.parent}") if file.exists() else None


class StartScores(Callback):
    """Scores the models before the first step, when they lie where they are trained; ``scores`` tells the result.

    It is kept in ``file``, by ``write(file, values)``, so that a resumed run need not measure it again.
    """

    def __init__(self, job: TrainingJob, file: Path, write: Any) -> None:
        self.job, self.file, self.write = job, file, write
        self.scores: Scores | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read what was scored before the run was interrupted."""
        if stage == "fit" and self.job.teacher is not None:
            known = read_start_scores(self.file) if trainer.is_global_zero else None
            self.scores = trainer.strategy.broadcast(known)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, unless that is known."""
        if self.scores is not None or self.job.teacher is None:
            return
        self.scores = self.job.scores(trainer)
        if trainer.is_global_zero:
            assert isinstance(self.scores, Comparison)
            self.write(self.file, asdict(self.scores))
