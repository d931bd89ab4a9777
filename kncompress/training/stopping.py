"""Stop a training after SIGINT or SIGTERM when it can be resumed exactly."""

import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from kncompress.training import signals
from kncompress.training.checkpoints import LastCheckpoint


class StopAtSignal(Callback):
    """Ends training at the end of the optimiser step in which a signal came, to any process: saves ``last.ckpt``.

    Raises ``Terminated`` in all processes together. A validation that is due runs first. A second signal ends the
    process at once.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._step = 0
        self._number = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits."""
        self._step = trainer.global_step
        signals.postpone(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other processes, after each optimiser step, whether to stop."""
        if trainer.global_step == self._step:  # a micro-batch within an accumulated step
            return
        self._step = trainer.global_step
        mine = torch.tensor(signals.received() or 0, device=trainer.strategy.root_device)
        self._number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if self._number and not self.last.validation_is_due(trainer):
            self._stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop after a validation, whose end has saved the checkpoint."""
        if self._number:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Signals end the process again as they come."""
        signals.postpone(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals end the process again as they come."""
        signals.postpone(False)

    def _stop(self, trainer: Trainer) -> None:
        self.last.save(trainer)
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}; resume={self.last.path.parent.parent}", file=sys.stderr)
        raise signals.Terminated(self._number)
