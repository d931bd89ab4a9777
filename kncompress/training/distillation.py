"""What pre-training and fine-tuning share: a student that trains beside a frozen teacher, both tapped."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from kncompress.anatomy.activations import fuse_gelu_
from kncompress.anatomy.taps import Taps
from kncompress.config import OptimizerConfig
from kncompress.distill import Objective, Outputs, layer_mapping
from kncompress.training.clock import TICKS, TrainingClock
from kncompress.training.optimization import build_optimizer, build_schedule, parameter_groups
from kncompress.training.recompute import keep_activations, recompute_layers
from kncompress.training.sharding import is_sharded, shard_


class Distillation(L.LightningModule):
    """A student and, where the objective compares with one, its teacher, with taps on what the objective reads.

    The teacher stays in evaluation mode and receives no gradients.

    Args:
        student: transformers model, in place.
        teacher: the model it learns from, or None.
        objective: the weighted loss.
        optimizer: optimiser and schedule.
        steps: optimiser steps of the whole run, for the schedule; or the clock that it follows.
        dropout: keep the student's dropout while training.
        recompute: of each layer of the student keep the input alone, and compute the rest again in the backward pass.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        objective: Objective,
        optimizer: OptimizerConfig,
        steps: int | TrainingClock,
        dropout: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.optimizer_config, self.steps = student.train(), optimizer, steps
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self._needs_teacher = objective.config.needs_teacher
        if teacher is None and self._needs_teacher:
            raise ValueError("the objective compares with a teacher, but there is none")
        self.objective = objective
        if not dropout:
            switch_off_dropout(student)
        for model in (student, teacher):
            if model is not None:
                fuse_gelu_(model)
        self.student_taps = Taps(student, objective.taps)
        self.teacher_taps = Taps(teacher, objective.taps) if teacher is not None else None
        self._groups = parameter_groups(student)
        if recompute:
            recompute_layers(student)

    def configure_model(self) -> None:
        """Cut the models into shards, where the strategy has a mesh of processes and they are not cut yet."""
        if self.device_mesh is None or is_sharded(self.student):
            return
        mesh = self.device_mesh["data_parallel"]
        shard_(self.student, mesh, trained=True)
        if self.teacher is not None:
            shard_(self.teacher, mesh, trained=False)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def outputs(self, **batch: Tensor) -> tuple[Outputs, Outputs | None]:
        """Outputs of the student and, where a term needs it, of the teacher, for equal inputs."""
        student = self._outputs(self.student, self.student_taps, batch)
        if self.teacher_taps is None or not self._needs_teacher:
            return student, None
        with torch.no_grad():
            return student, self._outputs(self.teacher, self.teacher_taps, batch)

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """What the objective takes for the logits of a model."""
        return model(**batch, use_cache=False).logits

    def _outputs(self, model: Any, taps: Taps, batch: dict[str, Tensor]) -> Outputs:
        logits = self.logits(model, batch)
        return Outputs(logits, **{name: getattr(taps, name) for name in taps.names})

    def forget(self) -> None:
        """Free what the taps recorded: after the loss is computed, the backward pass needs only part of it."""
        for taps in (self.student_taps, self.teacher_taps):
            if taps is not None:
                taps.forget()

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.student, self.optimizer_config, self._groups)
        length, settings = self.steps, self.optimizer_config
        if isinstance(length, TrainingClock):
            schedule = build_schedule(optimizer, TICKS, settings, lambda: length.tick)
        else:
            schedule = build_schedule(optimizer, length, settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Not by Lightning, which refuses a fused optimiser under any mixed precision, though bf16 scales nothing.
        if not gradient_clip_val:
            return
        nn.utils.clip_grad_norm_(self.student.parameters(), gradient_clip_val)

    def close(self) -> None:
        """Takes the taps off both models, and has the student keep its activations."""
        keep_activations(self.student)
        for taps in (self.student_taps, self.teacher_taps):
            if taps is not None:
                taps.close()


def teacher_layers(student: Any, teacher: Any, layers: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """Teacher layer of each student layer: ``layers``, or else evenly spread; None without a teacher."""
    if teacher is None or layers is not None:
        return None if layers is None else tuple(layers)
    return layer_mapping(teacher.config.num_hidden_layers, student.config.num_hidden_layers)


_SHARES = ("attention_dropout", "attn_dropout_p", "dropout", "hidden_dropout", "layerdrop")
"""Attributes that hold a dropout rate in modules without ``nn.Dropout``: Llama's attention, OPT's layers, ..."""


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout of ``model`` to 0; the model's config keeps its values."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
            continue
        for name in _SHARES:
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, 0.0)
