"""The loggers of a training run, which end with it, whatever ends it."""

from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType

import lightning as L

from kncompress.config import TrainConfig
from kncompress.reports.wandb_content import alert
from kncompress.runs.process import outcome
from kncompress.runs.record import RunRecord
from kncompress.training.divergence import DivergedError
from kncompress.training.loggers import build_loggers, finish_loggers
from kncompress.training.processes import end_children


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
        if isinstance(error, DivergedError):
            with self.record.tolerating("W&B alert"):
                alert(self.loggers, "training diverged", f"{self.name}: {error}")
        try:
            finish_loggers(self.loggers, self.record, code, self.metrics)
        finally:  # a signal may come while W&B uploads
            if self.trainer is not None:
                end_children(self.trainer, failed=code != 0)
