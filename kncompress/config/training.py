"""``train``: how long, on what devices, where its metrics go."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choices, check_not_negative, check_positive, choice
from kncompress.config.distillation import ObjectiveConfig, OptimizerConfig
from kncompress.config.factoring import FactoringConfig
from kncompress.errors import UserError


@dataclass
class TrainerConfig:
    """How long, on what, in which precision. Batches are counted in tokens."""

    tokens: int | None = None
    """Training tokens in all; null: one epoch. Rounded up to whole steps."""
    steps: int | None = None
    """Optimiser steps in all; overrides ``tokens``."""
    minutes: float | None = None
    """Minutes of training in all, validations included, instead of tokens or steps: the schedule follows the clock, and
    is at its end when the time is."""
    batch_tokens: int = 8192
    """Tokens of one optimiser step, over all devices: more of them share the same batch."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward pass of one device; the rest of the batch is accumulated."""
    accelerator: str = choice("auto", "auto", "cpu", "gpu")
    """``cpu``, ``gpu`` or ``auto``."""
    strategy: str = choice("auto", "auto", "ddp", "fsdp")
    """``ddp``: a copy of the model in each process; ``fsdp``: one model in shards over them; ``auto``: one process,
    or ddp where there are several."""
    devices: Any = 1
    """Processes on each node, one a GPU or, on CPUs, one a share of the cores; ``auto``: every GPU of the node, or what
    torchrun or SLURM has started."""
    nodes: int = 1
    """Machines."""
    precision: str = choice("auto", "auto", "fp32", "bf16")
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 where the hardware multiplies it natively."""
    recompute: bool = False
    """Activation checkpointing: each layer of the student keeps its input alone, and is computed again in the backward
    pass. Less memory, the same results, one more forward pass of the student."""
    teacher: str = choice("fp32", "fp32", "bf16")
    """Weights of the teacher: ``fp32``, or ``bf16``: half the memory; its scores in the table are then of these."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 leaves it alone."""
    dropout: bool = False
    """Keep the model's dropout while training."""
    validate_every: int | None = None
    """Steps between validations; null: ten in a run. Ten in any case where ``minutes`` are given."""
    validation_tokens: int | None = 65536
    """Most tokens of one validation during training; null: all."""
    test_tokens: int | None = None
    """Most tokens of the test split that are scored before and after training; null: all."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null: with every validation."""
    keep: str = choice("best", "best", "last")
    """Which weights become ``model/``: ``best`` (lowest validation loss) or ``last``."""

    def __post_init__(self) -> None:
        for name in (
            "tokens",
            "steps",
            "minutes",
            "batch_tokens",
            "micro_batch_tokens",
            "nodes",
            "validate_every",
            "validation_tokens",
            "test_tokens",
            "checkpoint_every",
        ):
            check_positive(f"trainer.{name}", getattr(self, name))
        for name in ("tokens", "steps"):
            if self.minutes is not None and getattr(self, name) is not None:
                other = f"trainer.{name}={getattr(self, name)}"
                raise UserError(
                    f"trainer.minutes={self.minutes:g}: the time decides how far it comes; not with {other}"
                )
        if self.devices != "auto" and (type(self.devices) is not int or self.devices < 1):
            raise UserError(f"trainer.devices={self.devices}: must be auto or a whole number from 1")
        check_choices(self, "trainer.")
        check_not_negative("trainer.gradient_clip", self.gradient_clip)


@dataclass
class LoggerConfig:
    """Where metrics go besides ``metrics.csv``."""

    name: str = choice("wandb", "wandb", "csv", "none")
    """``wandb``, ``csv`` (the file alone) or ``none``."""
    mode: str = choice("offline", "offline", "online", "disabled")
    """W&B: ``offline``, ``online`` or ``disabled``; ``WANDB_MODE`` overrides it."""
    required: bool = False
    """W&B, online: stop where it is not reached, instead of going on offline with a warning."""
    project: str = "kncompress"
    entity: str | None = None
    group: str | None = None
    """W&B group; null: the sweep's folder name in a sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of at most 64 characters, besides the names of the experiment and of the preset of factors."""
    artifact: bool = True
    """W&B: the model folder as an artifact, with its plan; of an offline run, ``wandb sync`` uploads it."""

    def __post_init__(self) -> None:
        check_choices(self, "logger.")
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UserError(f"logger.tags: {tag!r} has {len(tag)} characters; W&B takes 1 to 64")


@dataclass
class SamplesConfig:
    """Texts that teacher and trained student write, always by the likeliest token: ``samples.json``."""

    count: int = 3
    """Prompts, from evenly spaced places of the test split; 0: no samples."""
    prompt_tokens: int = 16
    """Tokens of a prompt."""
    tokens: int = 32
    """Most new tokens after it."""

    def __post_init__(self) -> None:
        check_not_negative("samples.count", self.count)
        check_positive("samples.prompt_tokens", self.prompt_tokens)
        check_positive("samples.tokens", self.tokens)


@dataclass
class TrainConfig(FactoringConfig):
    """``train``: teacher and text in, repaired student out."""

    student: str | None = None
    """Folder or hub id of a student that exists, compressed or dense, with the teacher's vocabulary; ``factors``,
    ``start``, ``fit`` and ``repair`` are then not read. Null: one is made of the teacher by these."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    budget: float | None = None
    """Plan the shapes of all maps first, in ``plan/`` of the run, instead of ``factors``. Up to 1: share of all unique
    parameters; above 1: their number."""
    speed: bool = False
    """With ``budget``: only shapes whose product is faster than the dense one, as in ``plan``."""
    unseen: Any = None
    """Source of a text that no fit and no training reads: the student is validated on it too, and teacher and student
    are scored on it in the end."""
    export: list[str] = choice([], "dense", "merged", "onnx", "int8")
    """Formats of ``export`` that the finished model is written in, each in ``export-<format>/`` of the run."""
    report: bool = False
    """Write ``report.html`` of the run (needs the extra ``reports``)."""
    resume: str | None = None
    """Folder of an unfinished run or sweep to continue; ``auto``: the run in ``run_dir``, or without one the newest in
    ``runs/`` with this configuration, and a new run where there is none; ``never`` or null: a new run. A sweep goes on
    with the newest of the same jobs unless ``never``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_positive("budget", self.budget)
        if self.speed and self.budget is None:
            raise UserError("speed=true: chooses among the shapes of budget=, which is not given")
        if self.student is not None and self.budget is not None:
            raise UserError(f"student={self.student}: exists; budget={self.budget:g} would plan another")
        if self.student is not None and self.model.path is None:
            raise UserError(f"student={self.student}: learns from a teacher; give model=<folder or hub id>")

    @property
    def needs_text(self) -> bool:
        """Whether the start, or the repair after it, reads text; a student that exists has neither."""
        return self.student is None and super().needs_text
