"""Progress through many short trainings: one line an epoch, and on a terminal a bar for the cell at work."""

from typing import TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from kncompress.terminal import Progress


class CellProgress(Callback):
    """Reports the epochs of one training on ``stream`` (standard error).

    Args:
        name: what the cell is, e.g. ``3/12 cola seed 0 student_ilkd``.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name, self._progress = name, Progress(name, stream=stream, quiet=0.0)
        self._best = float("-inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar on a terminal."""
        self._progress.begin(float(trainer.estimated_stepping_batches))
        self._move(0)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Move the bar."""
        if self._progress.due:
            self._move(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line with the mean loss of the epoch and the score after it."""
        loss = trainer.callback_metrics.get("train/loss")
        score = trainer.callback_metrics.get("validation/score")
        parts = [f"{self.name}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        parts += [f"loss {float(loss):.4g}"] if loss is not None else []
        if score is not None:
            parts.append(f"score {100 * float(score):.2f}" + (" (best)" if float(score) > self._best else ""))
            self._best = max(self._best, float(score))
        self._progress.say("  ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal as it was."""
        self._progress.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._progress.close()

    def _move(self, step: int) -> None:
        if self._progress.on_terminal:  # in a log the lines of the epochs are enough
            self._progress.show(step, str(step))
