"""Stop a training that has diverged before it harms weights or checkpoints."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from kncompress.errors import CheckFailed

ADVICE = "the checkpoints hold the last good weights; try a lower optimizer.lr or trainer.gradient_clip"


class DivergedError(CheckFailed):
    """The loss or its gradient is no longer finite; ``step`` is the optimiser step, counted from 1."""

    def __init__(self, step: int, what: str, advice: str) -> None:
        super().__init__(f"training diverged: the {what} of step {step} is not finite; {advice}")
        self.step = step


class NonFiniteLoss(Callback):
    """Raises :class:`DivergedError` when the loss or the gradient norm is NaN or infinite.

    It looks after the backward pass and before the optimiser's step, so that weights and checkpoints stay good. It
    looks once per step only, since each look waits for the device. All ranks stop together.
    """

    def __init__(self, advice: str = ADVICE) -> None:
        self.advice = advice
        self._loss_is_finite: Tensor | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take note of the loss of a micro-batch, on the device."""
        finite = torch.isfinite(loss.detach()).all()
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses and gradients that the step is made of."""
        parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        loss_is_finite = self._loss_is_finite is None or bool(self._loss_is_finite)
        self._loss_is_finite = None
        self._agree(trainer, loss_is_finite, "loss")
        self._agree(trainer, bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))), "gradient")

    def _agree(self, trainer: Trainer, finite: bool, what: str) -> None:
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise DivergedError(trainer.global_step + 1, what, self.advice)
