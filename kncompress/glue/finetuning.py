"""Fine-tuning on a GLUE task, plain or distilled from a fine-tuned teacher."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from kncompress.config import FineTuningConfig, ObjectiveConfig, OptimizerConfig
from kncompress.distill import SequenceObjective
from kncompress.glue.scores import glue_scores, task_score
from kncompress.glue.sequences import Sequences, scoring_loader, training_loader
from kncompress.glue.tasks import HIGHEST, LOWEST, GlueTask
from kncompress.training.distillation import Distillation, teacher_layers
from kncompress.training.processes import accelerator
from kncompress.training.trainer import precision


@dataclass(frozen=True)
class TaskData:
    """A task, encoded: training set and dev sets by the suffix of their metrics."""

    task: GlueTask
    train: Sequences
    dev: dict[str, Sequences]
    padding: int


class GLUEFineTuning(Distillation):
    """Trains a sequence classifier of transformers on one task.

    Without a teacher, or with an objective that compares with none, this is ordinary fine-tuning. With one, fine-tuned
    on the same task, it is intermediate-layer distillation (KnGPT2, arXiv 2110.08152): padding takes no part in any
    term. After every epoch ``scores`` and ``score`` hold those of the dev sets; logged: ``train/loss``, every term as
    ``train/<term>`` and ``validation/score``.

    Args:
        student: sequence classifier with ``task.outputs`` outputs, in place.
        teacher: the same, fine-tuned, or None.
        task: tells whether the label is a score.
        objective: weights of the loss; ``cross_entropy`` is that of the labels.
        optimizer: optimiser and schedule.
        steps: optimiser steps of the whole training, for the schedule.
        dropout: keep the student's dropout while training.
        layers: teacher layer of each student layer; None: evenly spread.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        task: GlueTask,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        steps: int,
        dropout: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        pairs = teacher_layers(student, teacher, layers)
        super().__init__(
            student, teacher, SequenceObjective(objective, pairs, task.is_regression), optimizer, steps, dropout
        )

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return sequence_logits(model, **batch)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        mask = batch["attention_mask"]
        student, teacher = self.outputs(input_ids=batch["input_ids"], attention_mask=mask)
        loss = self.objective(student, teacher, batch["labels"], mask)
        named = {"loss": loss.total.detach(), **loss.terms}
        means = {f"train/{name}": value for name, value in named.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=len(mask))
        return loss.total


class EpochScores(Callback):
    """Scores the student after every epoch, keeps the best weights and stops when nothing has improved for long.

    Best is the epoch with the highest mean of the task's metrics on its dev sets; of equal ones the first.
    """

    def __init__(self, data: TaskData, batch_size: int, patience: int | None) -> None:
        self.data, self.batch_size, self.patience = data, batch_size, patience
        self.history: list[dict[str, float]] = []
        self.best: int | None = None
        """Epoch with the best score, counted from 1."""
        self.weights: dict[str, Tensor] = {}
        self.seconds = 0.0
        """Of training, scoring left out."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self._began
        student: Any = pl_module.student
        scores = evaluate(student, self.data, self.batch_size)
        student.train()
        terms = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.history.append(terms | scores | {"score": task_score(scores.values())})
        pl_module.log("validation/score", self.history[-1]["score"])
        score = self.history[-1]["score"]
        if self.best is None or score > self.history[self.best - 1]["score"]:
            self.best = len(self.history)
            self.weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
        elif self.patience is not None and len(self.history) - self.best >= self.patience:
            trainer.should_stop = True


@dataclass(frozen=True)
class FineTuned:
    """How one training went. The model has the weights of the best epoch."""

    scores: dict[str, float]
    """Of the dev sets, by metric, with the weights of the best epoch."""
    best_epoch: int
    steps: int
    history: list[dict[str, float]]
    """Of every epoch: mean of the loss and of its terms, scores."""
    seconds: float
    """Of training, without scoring."""
    examples_per_second: float

    @property
    def score(self) -> float:
        """Mean of the metrics."""
        return task_score(self.scores.values())


def fine_tune(
    student: Any,
    teacher: Any | None,
    data: TaskData,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    settings: FineTuningConfig,
    seed: int,
    layers: Sequence[int] | None = None,
    callbacks: Sequence[Callback] = (),
) -> FineTuned:
    """Train ``student`` in place, to the weights of its best epoch; see ``GLUEFineTuning``.

    ``seed`` decides on the order of the examples and on dropout. Both models end on the CPU, without taps.
    """
    L.seed_everything(seed, verbose=False)
    loader = training_loader(data.train, settings.batch_size, data.padding, seed)
    steps = settings.epochs * len(loader)
    module = GLUEFineTuning(student, teacher, data.task, objective, optimizer, steps, settings.dropout, layers)
    epochs = EpochScores(data, settings.batch_size, settings.patience)
    trainer = L.Trainer(
        accelerator=accelerator(settings.accelerator),
        devices=1,
        precision=precision(settings.precision, settings.accelerator),
        max_epochs=settings.epochs,
        gradient_clip_val=settings.gradient_clip or None,
        callbacks=[epochs, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, loader)
    finally:
        module.close()
    module.cpu()
    student.load_state_dict(epochs.weights)
    student.eval().requires_grad_(True)
    assert epochs.best is not None
    chosen = epochs.history[epochs.best - 1]
    scores = {name: value for name, value in chosen.items() if name != "score" and not name.startswith("train/")}
    seen = len(epochs.history) * len(data.train)
    return FineTuned(
        scores, epochs.best, trainer.global_step, epochs.history, epochs.seconds, seen / max(epochs.seconds, 1e-9)
    )


def sequence_logits(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, C): the head of a sequence classifier at the last real token by the mask (B, T), padding on the right.

    transformers' own forward pass looks for the last token that is not the padding token instead. Both agree on the
    sequences of ``data.sequences`` unless a text itself ends in that token.
    """
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    last = attention_mask.sum(-1) - 1
    return model.score(hidden[torch.arange(len(last), device=last.device), last])


@torch.no_grad()
def predict(model: Any, sequences: Sequences, padding: int, batch_size: int) -> Tensor:
    """Logits (N, C) of every example, in their order, float32 on the CPU; on the model's device, in evaluation mode."""
    loader, order = scoring_loader(sequences, batch_size, padding)
    model.eval()
    found = []
    for batch in loader:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        found.append(sequence_logits(model, **inputs).float().cpu())
    logits = torch.cat(found)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def answers(logits: Tensor, task: GlueTask) -> Tensor:
    """Labels (N,), int64, or scores (N,) within the task's range, of logits (N, C)."""
    return logits[:, 0].clamp(LOWEST, HIGHEST) if task.is_regression else logits.argmax(-1)


def evaluate(model: Any, data: TaskData, batch_size: int) -> dict[str, float]:
    """{metric: score} on the dev sets; of two sets ``<metric>_<suffix>``."""
    found: dict[str, float] = {}
    for suffix, sequences in data.dev.items():
        predicted = answers(predict(model, sequences, data.padding, batch_size), data.task)
        targets = torch.tensor(sequences.labels)
        scores = glue_scores(data.task.metrics, predicted, targets, data.task.outputs)
        found |= {f"{name}_{suffix}" if suffix else name: value for name, value in scores.items()}
    if not all(map(math.isfinite, found.values())):
        raise FloatingPointError(f"{data.task.id}: a score is not finite")
    return found
