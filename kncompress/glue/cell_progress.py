"""Progress through many short trainings: one line an epoch, and on a terminal a bar for the cell at work."""

import sys
from typing import TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class CellProgress(Callback):
    """Reports the epochs of one training on ``stream`` (standard error).

    Args:
        name: what the cell is, e.g. ``3/12 cola seed 0 student_ilkd``.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name, self.stream = name, stream or sys.stderr
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._best = float("-inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar on a terminal."""
        if self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.completed:.0f}"))
            self._bar = Progress(*columns, console=Console(file=self.stream), expand=True, transient=True)
            self._task = self._bar.add_task(self.name, total=float(trainer.estimated_stepping_batches))
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line with the mean loss of the epoch and the score after it."""
        loss = trainer.callback_metrics.get("train/loss")
        score = trainer.callback_metrics.get("validation/score")
        parts = [f"{self.name}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        parts += [f"loss {float(loss):.4g}"] if loss is not None else []
        if score is not None:
            parts.append(f"score {100 * float(score):.2f}" + (" (best)" if float(score) > self._best else ""))
            self._best = max(self._best, float(score))
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
