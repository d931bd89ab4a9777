"""``glue``: fine-tuning of sequence classifiers."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choices, check_not_negative, check_positive, choice
from kncompress.config.distillation import ObjectiveConfig, OptimizerConfig
from kncompress.config.factoring import FactorsConfig
from kncompress.config.run import ModelRunConfig
from kncompress.errors import UserError


@dataclass
class GlueDataConfig:
    """The GLUE tasks, and how they become sequences."""

    source: str = "sample"
    """``hub``: ``nyu-mll/glue`` of the Hugging Face hub; a folder in the layout of the official download
    (``<folder>/CoLA/train.tsv``); ``sample``: the task ``polarity``, 200 sentences, a smoke run."""
    train_examples: int | None = None
    """Most training examples of a task, chosen by a hash of their texts; null: all."""
    max_length: int = 128
    """Most tokens of a sequence; longer ones lose the end of their longer text."""
    cache_dir: str | None = None
    """Fine-tuned teachers; null: ``$KNCOMPRESS_CACHE`` or ``~/.cache/kncompress``."""

    def __post_init__(self) -> None:
        check_positive("data.train_examples", self.train_examples)
        if self.max_length < 8:
            raise UserError(f"data.max_length={self.max_length}: must be 8 or more")


@dataclass
class FineTuningConfig:
    """How long a model is fine-tuned, and on what."""

    epochs: int = 3
    """Most passes over the training set; the schedule ends with the last one."""
    batch_size: int = 32
    """Sequences of one optimiser step."""
    patience: int | None = None
    """Epochs without a better dev score after which training stops; null: never before the last."""
    dropout: bool = True
    """Keep the model's dropout while training."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 leaves it alone."""
    accelerator: str = choice("auto", "auto", "cpu", "gpu")
    """``cpu``, ``gpu`` or ``auto``."""
    precision: str = choice("auto", "auto", "fp32", "bf16")
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 where the hardware multiplies it natively. Scores: fp32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            check_positive(f"fine_tuning.{name}", getattr(self, name))
        check_not_negative("fine_tuning.gradient_clip", self.gradient_clip)
        check_choices(self, "fine_tuning.")


@dataclass
class GlueConfig(ModelRunConfig):
    """``glue``: fine-tune a teacher on GLUE tasks, then its students, plain and distilled from it (ILKD).

    ``model`` is the teacher; ``teacher=`` and ``teacher.KEY=`` mean the same. Every cell (task, seed, model) is a
    file in ``cells/`` that is not computed again when the run is resumed.
    """

    student: str | None = None
    """Folder or hub id of the student, with the teacher's tokenizer; null: the teacher with ``factors``, untrained."""
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    """Factors nearest to the teacher's weights; not read where ``student`` is given."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Further students, {name: folder, hub id, preset of factors or YAML file}, e.g. ``baselines.half=layerdrop``."""
    tasks: Any = "all"
    """``all``: every task that the source has; or some of cola sst2 mrpc stsb qqp mnli qnli rte wnli ax polarity."""
    seeds: Any = 1
    """How many, counted from ``seed``; or a list of them. A seed sets the new head, the order of examples, dropout."""
    training: list[str] = choice(["plain", "ilkd"], "plain", "ilkd")
    """How the student is fine-tuned: ``plain``, ``ilkd``, or both."""
    baseline_training: list[str] = choice(["ilkd"], "plain", "ilkd")
    """How the baselines are."""
    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Of ``ilkd``. ``cross_entropy`` is the loss on the labels (squared error of a score), ``logits`` compares the
    answers."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    predictions: bool | None = None
    """Write ``predictions/`` for the test sets in the format of a submission; null: where there are test sets. Those
    of QQP and QNLI, which the hub has, are larger than all dev sets together."""
    save_models: bool = False
    """Keep every fine-tuned student in ``models/``."""
    resume: str | None = None
    """Folder of an unfinished run to continue; ``auto``, ``never``: as in ``train``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds = self.seeds if isinstance(self.seeds, list) else [self.seeds]
        if not seeds or any(type(seed) is not int for seed in seeds) or (self.seeds == seeds[0] and seeds[0] < 1):
            raise UserError(f"seeds={self.seeds}: must be a number from 1, or a list of seeds")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds={self.seeds}: names a seed twice")
        if self.objective.cache is not None:
            raise UserError(f"objective.cache={self.objective.cache}: is for train; glue's teacher scores few labels")

    @property
    def all_training(self) -> set[str]:
        """Recipes of the student and of the baselines, if any."""
        return set(self.training) | (set(self.baseline_training) if self.baselines else set())

    @property
    def seed_list(self) -> list[int]:
        """The seeds of the run."""
        if isinstance(self.seeds, list):
            return list(self.seeds)
        return [self.seed + number for number in range(self.seeds)]
