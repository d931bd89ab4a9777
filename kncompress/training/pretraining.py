"""Teacher-student pre-training on text."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.config import ObjectiveConfig, OptimizerConfig
from kncompress.distill import Loss, Objective, Outputs, cross_entropy
from kncompress.errors import UserError
from kncompress.evaluation import TokenMean
from kncompress.training.clock import TrainingClock
from kncompress.training.distillation import Distillation, teacher_layers
from kncompress.training.sharding import is_sharded
from kncompress.training.teacher_cache import TeacherCache

_TEACHER = "teacher."


class ILKDPretraining(Distillation):
    """Trains a student on text by intermediate-layer knowledge distillation from a frozen teacher.

    (KnGPT2, arXiv 2110.08152.) Without a teacher only the cross-entropy term can be used: ordinary pre-training.
    The teacher stays in evaluation mode, receives no gradients and is left out of checkpoints. Logged:
    ``train/loss`` and every term as ``train/<term>``, means over all micro-batches and processes of an optimiser
    step, ``train/tokens_per_second``, ``train/tokens``, ``validation/loss`` (cross-entropy of the student, nats
    per token) and ``validation/perplexity``; of a second text ``unseen/loss`` and ``unseen/perplexity``.

    Args:
        student: causal language model of transformers, in place.
        teacher: the model it learns from, or None.
        objective: weights of the loss.
        optimizer: optimiser and schedule.
        steps: optimiser steps of the whole run, for the schedule; or the clock that it follows.
        dropout: keep the student's dropout while training.
        layers: the teacher layer that each student layer learns from, counted from 0; None: evenly spread
            (``layer_mapping``).
        cache: draws that stand for the teacher's logits; batches then tell their blocks' numbers.
        recompute: of each layer of the student keep the input alone (``Distillation``).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        steps: int | TrainingClock,
        dropout: bool = False,
        layers: Sequence[int] | None = None,
        cache: TeacherCache | None = None,
        recompute: bool = False,
    ) -> None:
        loss = Objective(objective, teacher_layers(student, teacher, layers), overwrites=True)
        super().__init__(student, teacher, loss, optimizer, steps, dropout, recompute)
        self.cache = cache
        self._losses: list[Tensor] = []
        self.validation_nll, self.unseen_nll = TokenMean(), TokenMean()
        self._clock: tuple[float, int] | None = None
        self._tokens = 0

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        ids = batch["input_ids"]
        student, teacher = self.outputs(input_ids=ids) if self.cache is None else self._with_draws(ids, batch["block"])
        loss = self.objective(student, teacher, batch["labels"])
        self.forget()
        self._note(loss)
        self._tokens += ids.numel() * self.trainer.world_size
        return loss.total

    def _with_draws(self, ids: Tensor, blocks: Tensor) -> tuple[Outputs, Outputs]:
        """Outputs of the student, and draws of the teacher, which runs on blocks that it has not seen."""
        assert self.cache is not None and self.teacher is not None

        def logits(places: Tensor) -> Tensor:
            with torch.no_grad():
                return self.logits(self.teacher, {"input_ids": ids[places]})

        # Where the teacher is in shards, all processes run it together or none does.
        together = self.trainer.strategy.reduce_boolean_decision if is_sharded(self.teacher) else None
        draws = self.cache.draws(blocks, logits, ids.device, together and partial(together, all=False))
        return Outputs(self.logits(self.student, {"input_ids": ids})), Outputs(None, draws=draws)

    def _note(self, loss: Loss) -> None:
        """Take note of one micro-batch, and log the means where it is the last of an optimiser step."""
        self._losses.append(torch.stack([loss.total.detach(), *loss.terms.values()]))
        if len(self._losses) < self.trainer.accumulate_grad_batches:
            return
        means = self.trainer.strategy.reduce(torch.stack(self._losses).mean(0), reduce_op="mean")
        self._losses.clear()
        names = ("loss", *loss.terms)
        self.log_dict({f"train/{name}": value for name, value in zip(names, means, strict=True)}, on_step=True)

    def on_train_start(self) -> None:
        self._clock = (time.perf_counter(), self._tokens)

    def on_train_batch_end(self, *_: Any) -> None:
        start, tokens = self._clock or (time.perf_counter(), self._tokens)
        elapsed = time.perf_counter() - start
        if elapsed > 0:
            self.log("train/tokens_per_second", (self._tokens - tokens) / elapsed)
        self.log("train/tokens", float(self._tokens))

    def on_validation_start(self) -> None:
        self._validation_began = time.perf_counter()

    def on_validation_end(self) -> None:
        # Validation does not count as training time.
        if self._clock is not None:
            start, tokens = self._clock
            self._clock = (start + time.perf_counter() - self._validation_began, tokens)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int, dataloader_idx: int = 0) -> None:
        logits = self.student(input_ids=batch["input_ids"], use_cache=False).logits
        scored = int((batch["labels"][:, 1:] != -100).sum())
        # Blocks that only fill up the round of several processes have no labels, and so no mean.
        total = cross_entropy(logits, batch["labels"]) * scored if scored else 0.0
        (self.validation_nll, self.unseen_nll)[dataloader_idx].update(total, scored)

    def on_validation_epoch_end(self) -> None:
        for name, mean in (("validation", self.validation_nll), ("unseen", self.unseen_nll)):
            if not mean.update_called:
                continue
            nll = mean.compute()
            mean.reset()
            scores = {f"{name}/loss": nll, f"{name}/perplexity": nll.exp()}
            self.log_dict(scores, sync_dist=True)  # equal on all ranks; Lightning wants it said

    @property
    def tokens_seen(self) -> int:
        """Training tokens so far, over all devices and resumed parts."""
        return self._tokens

    def is_saved(self, key: str) -> bool:
        """Whether a checkpoint has this entry of ``state_dict``."""
        return not key.startswith(_TEACHER)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if self.is_saved(key)}
        checkpoint["tokens_seen"] = self._tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens = checkpoint["tokens_seen"]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a checkpoint, which must lack the teacher's weights and nothing else."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if self.is_saved(key)]
        if strict and (missing or result.unexpected_keys):
            other = f"lacks {missing[0]}" if missing else f"holds {result.unexpected_keys[0]}"
            raise UserError(
                f"resume: the checkpoint {other}: it is of another student than config.yaml describes; "
                "put that file back, or start a new run"
            )
        return result
