"""The loggers of a training run, which end with it, whatever ends it."""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType

import lightning as L

from kncompress.config import TrainConfig
from kncompress.errors import UserError
from kncompress.reports.wandb_content import alert
from kncompress.runs.process import outcome
from kncompress.runs.record import RunRecord, keep_outcome
from kncompress.training.divergence import DivergedError
from kncompress.training.loggers import build_loggers, finish_loggers
from kncompress.training.processes import end_children
from kncompress.training.ranks import Launcher, LostProcess, lost

_SECONDS_TO_SHOW, _SECONDS_FOR_WANDB = 1.0, 10.0


class LoggedRun:
    """A context: started loggers inside; on the way out all of them get the exit code of the process.

    Processes that ``trainer`` has started end there too, and W&B alerts the user of a run that diverged.

    Args:
        config: of the run.
        record: of the run.
        sweep: name of the sweep's folder, where the run is a job of one.
        tags: of the W&B run.
    """

    def __init__(self, config: TrainConfig, record: RunRecord, sweep: str | None, tags: Sequence[str]) -> None:
        folder = record.folder
        self.record, self.name = record, folder.name
        self.loggers = build_loggers(config.logger, folder, record, asdict(config), folder.name, sweep, tags)
        self.trainer: L.Trainer | None = None
        self.metrics: dict[str, float] = {}
        """Final results."""

    def __enter__(self) -> "LoggedRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = outcome(error)[1]
        gone = self._lost(error) if isinstance(error, Exception) and not isinstance(error, UserError) else None
        if isinstance(error, DivergedError):
            with self.record.tolerating("W&B alert"):
                alert(self.loggers, "training diverged", f"{self.name}: {error}")
        try:
            finish_loggers(self.loggers, self.record, code, self.metrics)
        finally:  # a signal may come while W&B uploads
            if self.trainer is not None:
                end_children(self.trainer, failed=code != 0)
        if gone is not None:  # what the others' connections say of it helps nobody
            raise gone from error

    def watch(self, trainer: L.Trainer) -> None:
        """Take the trainer, and care for the end of the run where one of its processes is lost and this one hangs."""
        self.trainer = trainer
        if isinstance(trainer.strategy.launcher, Launcher):
            trainer.strategy.launcher.give_up = self._give_up

    def _lost(self, error: Exception) -> LostProcess | None:
        """The lost process behind an error, which may show a moment later than its broken connection."""
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if not isinstance(launcher, Launcher):
            return None
        end = time.monotonic() + _SECONDS_TO_SHOW
        while (found := lost(launcher.procs)) is None and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _give_up(self, error: LostProcess) -> None:
        print(f"kncompress: {error}", file=sys.stderr, flush=True)
        self.record.finish("failed", error=error)
        end = {"status": "failed", "exit_code": 1, "error": str(error)}
        keep_outcome(self.record.folder, self.record.fields["verb"], end, began=True)
        # W&B may wait for ever; without an end it shows the run as crashed.
        ending = threading.Thread(target=finish_loggers, args=(self.loggers, self.record, 1), daemon=True)
        ending.start()
        ending.join(_SECONDS_FOR_WANDB)
