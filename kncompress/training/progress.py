"""What a person sees while a model trains: a live bar on a terminal, plain lines in a log."""

import math
import time
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from kncompress.terminal import Progress, clock
from kncompress.training.clock import TrainingClock

SHARE = 0.05
"""Part of the steps after which a plain line is due."""
SECONDS = 30.0
"""Time after which a plain line is due, whatever the share."""


class TrainingProgress(ProgressBar):
    """Progress in optimiser steps on ``stream`` (standard error), by rank 0.

    Shows ``train/loss``, ``train/tokens_per_second``, ``validation/loss`` and ``unseen/perplexity`` as the module logs
    them.
    Perplexity is ``train/perplexity``, else exp of ``train/cross_entropy``, else exp of the loss where
    ``loss_is_cross_entropy`` says that it means that; the same for ``validation/``. Lightning replaces its
    own bar by this one. Where a ``clock`` ends the training, the bar is its time.
    """

    def __init__(
        self, loss_is_cross_entropy: bool = False, stream: TextIO | None = None, clock: TrainingClock | None = None
    ) -> None:
        super().__init__()
        self._clock = clock
        self.loss_is_cross_entropy = loss_is_cross_entropy
        self._enabled = True
        self._progress = Progress("training", None, stream, quiet=0.0, lines=SECONDS, kept=True)
        self._best = math.inf

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def state_dict(self) -> dict[str, float]:
        """Return the best validation loss, so that a resumed run does not call the next one best."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over the best validation loss."""
        self._best = state_dict["best"]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar, or just a line."""
        self._line(" ".join(str(arg) for arg in args))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training starts (not at 0 after a resume), and start the bar on a terminal."""
        self._first = self._seen = self._shown = trainer.global_step
        self._started = time.monotonic()
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) and total > 0 else None
        self._progress.begin(self._total if self._clock is None else 1.0)
        if self._enabled and self._progress.on_terminal:
            self._show(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step where one is complete and something new is due."""
        step = trainer.global_step
        if not self._enabled or step == self._seen:  # a micro-batch within an accumulated step
            return
        self._seen = step
        share = (step - self._shown) / self._total if self._total else 0.0
        due = self._progress.due or step == self._total or (share >= SHARE and not self._progress.on_terminal)
        if due:
            self._show(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a validation in a line of its own."""
        loss = _metric(trainer, "validation/loss")
        if trainer.sanity_checking or trainer.state.fn != "fit" or loss is None:
            return
        best = loss < self._best
        self._best = min(loss, self._best)
        parts = [self._position(trainer), f"validation loss {loss:.4g}", self._perplexity(trainer, "validation")]
        unseen = self._perplexity(trainer, "unseen")
        self._line(
            "  ".join(part for part in [*parts, unseen and f"unseen {unseen}", "(best)" if best else ""] if part)
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last step, unless it is shown already."""
        if self._enabled and trainer.global_step != self._shown:
            self._show(trainer)
        self._progress.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._progress.close()

    def _show(self, trainer: Trainer) -> None:
        self._shown, text = trainer.global_step, self._status(trainer)
        self._progress.show(self._shown if self._clock is None else self._clock.share, text, line=text)

    def _line(self, text: str) -> None:
        if self._enabled:
            self._progress.say(text)

    def _position(self, trainer: Trainer) -> str:
        step = trainer.global_step
        if self._clock is not None:
            return f"step {step} ({self._clock.share:.0%} of {self._clock.minutes:g} min)"
        return f"step {step}/{self._total} ({step / self._total:.0%})" if self._total else f"step {step}"

    def _status(self, trainer: Trainer) -> str:
        parts = [self._position(trainer)]
        if (loss := _metric(trainer, "train/loss")) is not None:
            parts.append(f"loss {loss:.4g}")
        parts.append(self._perplexity(trainer, "train"))
        if (speed := _metric(trainer, "train/tokens_per_second")) is not None:
            parts.append(f"{speed:.0f} tokens/s")
        done = trainer.global_step - self._first
        if self._clock is not None:
            parts.append(f"eta {clock(self._clock.left)}")
        elif self._total and done:
            left = (time.monotonic() - self._started) / done * (self._total - trainer.global_step)
            parts.append(f"eta {clock(left)}")
        return "  ".join(part for part in parts if part)

    def _perplexity(self, trainer: Trainer, stage: str) -> str:
        value = _metric(trainer, f"{stage}/perplexity")
        if value is None:
            nats = _metric(trainer, f"{stage}/cross_entropy")
            if nats is None and self.loss_is_cross_entropy:
                nats = _metric(trainer, f"{stage}/loss")
            value = None if nats is None else math.exp(min(nats, 700.0))  # exp(710) overflows
        return "" if value is None else f"ppl {value:.3g}" if value < 1000 else f"ppl {value:,.0f}"


def _metric(trainer: Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)
