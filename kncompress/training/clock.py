"""Training by the clock: for so many minutes, with schedule, validations and end after the time instead of steps."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

TICKS = 10_000
"""Steps of the schedule: parts of the whole time."""
_NEVER = 2**62


class TrainingClock(Callback):
    """Ends training when its minutes are used, and validates each time a tenth of them has passed.

    Counted is the time from the first step on, validations and checkpoints with it, over all parts of a run that is
    resumed. It is the first process's time that counts for all. Comes before the callbacks that ask whether a
    validation is due, with ``val_check_interval`` of the trainer at ``NO_INTERVAL``.
    """

    NO_INTERVAL = _NEVER

    def __init__(self, minutes: float, validations: int = 10, now: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self.validations = minutes, validations
        self.seconds = 0.0
        """Used so far."""
        self._now = now
        self._since = now()
        self._step_seconds = 0.0
        self._validated = 0
        self._step = 0

    @property
    def share(self) -> float:
        """Part of the time that is used, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, 60 * self.minutes - self.seconds)

    @property
    def tick(self) -> int:
        """Place of the next step in a schedule of ``TICKS`` steps: one step more is used when it is made."""
        return min(TICKS, round(TICKS * (self.seconds + self._step_seconds) / (60 * self.minutes)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run that has used its time makes no step."""
        self._since, self._step = self._now() - self.seconds, trainer.global_step
        trainer.should_stop = self.share >= 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Read the clock, for all processes, before the schedule sets the rate of the next step."""
        before = self.seconds
        self.seconds = float(trainer.strategy.broadcast(self._now() - self._since))
        self._step_seconds = self.seconds - before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: have a validation follow where one is due, and stop at the end of the time."""
        if trainer.global_step == self._step:  # a micro-batch within an accumulated step
            return
        self._step = trainer.global_step
        passed = int(self.share * self.validations)
        trainer.val_check_batch = trainer.accumulate_grad_batches if passed > self._validated else _NEVER
        self._validated = passed
        trainer.should_stop = self.share >= 1

    def state_dict(self) -> dict[str, float]:
        """Seconds used, and validations made."""
        return {"seconds": self.seconds, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from there."""
        self.seconds, self._validated = float(state_dict["seconds"]), int(state_dict["validated"])
