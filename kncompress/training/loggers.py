"""Where a run's metrics go: ``metrics.csv`` in its folder, and W&B, offline unless told otherwise."""

import os
import re
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from kncompress.config import LoggerConfig
from kncompress.diagnosis.network import answer, wandb_key, wandb_url
from kncompress.errors import UserError
from kncompress.runs.logged_names import STEP
from kncompress.runs.metrics_file import MetricsFile
from kncompress.runs.record import RunRecord
from kncompress.terminal import first_line

# W&B also knows "dryrun", an old name of "offline", and "shared".
MODES = {"offline": "offline", "dryrun": "offline", "online": "online", "shared": "shared", "disabled": "disabled"}
_PROBE_SECONDS, _INIT_SECONDS = 6.0, 10.0
"""What W&B's server gets to answer at all, and to start a run; with W&B's own start and end less than 20."""
_NO_ANSWER = re.compile(r"timed? ?out|deadline|connection|no such host|unreachable|giving up", re.IGNORECASE)


class CsvLogger(Logger):
    """Lightning logger of ``metrics.csv``.

    Lightning's own deletes the file when a run is resumed, and writes a row each for training and validation.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._file: MetricsFile | None = None

    @property
    def name(self) -> str:
        """Empty: the run folder is the only level."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run folder is the only level."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    def file(self) -> MetricsFile:
        """The file, opened at its first use; rank 0 alone gets there."""
        if self._file is None:
            self._file = MetricsFile(self.folder / "metrics.csv")
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add ``metrics`` to the row of ``step``; None: of the last step."""
        self.file.add(self.file.last_step if step is None else step, metrics)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after ``step``."""
        self.file.rewind(step)


class RewindMetrics(Callback):
    """On a resume, drop the rows of ``metrics.csv`` that are younger than the checkpoint."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file at the trainer's step, which Lightning has taken from the checkpoint by now."""
        if trainer.global_step > 0:
            for logger in trainer.loggers:
                if isinstance(logger, CsvLogger):
                    logger.rewind(trainer.global_step)


def build_loggers(
    config: LoggerConfig,
    folder: Path,
    record: RunRecord,
    run_config: Mapping[str, Any],
    job_name: str,
    sweep: str | None = None,
    tags: Sequence[str] = (),
) -> list[Logger]:
    """Return the loggers of one run, W&B's already started, its run id kept in ``record``.

    Args:
        config: ``name`` none gives no logger, csv the file alone. ``WANDB_MODE`` wins over ``mode``.
        run_config: the resolved configuration, logged once.
        job_name: the run's name in W&B.
        sweep: name of the sweep's folder; the W&B group where ``config.group`` is null.
        tags: W&B tags, besides ``config.tags``. A resumed run keeps those, and the group, that it began with.

    Raises:
        UserError: an unknown ``WANDB_MODE``, or W&B cannot be used as asked (no API key, not reached).
    """
    if config.name == "none":
        return []
    loggers: list[Logger] = [CsvLogger(folder)]
    mode = _mode(config)
    if config.name == "wandb" and mode != "disabled" and record.writes:
        loggers.append(_wandb(config, mode, folder, record, run_config, job_name, sweep, tags))
    return loggers


def _mode(config: LoggerConfig) -> str:
    asked = os.environ.get("WANDB_MODE")
    if asked and asked not in MODES:
        raise UserError(f"WANDB_MODE={asked}: not one of {', '.join(MODES)}")
    return MODES[asked or config.mode]


def _wandb(
    config: LoggerConfig,
    mode: Any,
    folder: Path,
    record: RunRecord,
    run_config: Mapping[str, Any],
    job_name: str,
    sweep: str | None,
    tags: Sequence[str],
) -> WandbLogger:
    import wandb

    group = config.group or sweep or record.fields["wandb_group"]
    tags = list(dict.fromkeys([*config.tags, *tags, *record.fields["wandb_tags"]]))

    if wandb.run is not None:
        # A run left open would swallow this one: init would return it, or Lightning would go on in it.
        wandb.finish(exit_code=1)

    def begin(mode: Any) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=group,
            name=job_name,
            tags=tags or None,
            dir=str(folder),
            id=record.wandb_id or _new_id(sweep),
            resume="allow",
            mode=mode,
            config=dict(run_config),
            # Offline there is nothing worth a banner; online there are the run's address and a prompt for a
            # missing key. Console off: no copy of a live progress bar in a log.
            settings=wandb.Settings(silent=mode == "offline", console="off", init_timeout=_INIT_SECONDS),
        )

    away = None
    try:
        if mode != "offline" and wandb_key() is not None:  # W&B tells that there is none
            away = _away()
        if away is not None and config.required:
            raise UserError(f"logger.mode={mode}: W&B is not reached ({away}); logger.required=false goes on offline")
        if away is None:
            run = begin(mode)
    except wandb.errors.Error as error:
        if config.required or not isinstance(error, wandb.errors.CommError) or not _NO_ANSWER.search(str(error)):
            raise UserError(
                f"logger.mode={mode}: {first_line(error)}; logger.mode=offline needs neither key nor network"
            ) from error
        away = first_line(error)
    if away is not None:
        run = begin("offline")
        later = f"wandb sync {run.settings.sync_dir}"
        record.warn(f"logger.mode={mode}: W&B is not reached ({away}); logged offline, `{later}` uploads it later")
    try:
        record.fields |= {"wandb_group": group, "wandb_tags": tags}
        record.wandb_id = run.id
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
    except BaseException:
        run.finish(exit_code=1)
        raise
    # Given a started run, the logger neither starts its own nor sets WANDB_MODE for the whole process.
    return WandbLogger(experiment=run, project=config.project, save_dir=str(folder), log_model=False)


def _away() -> str | None:
    """Why W&B's server does not answer, asked once and without W&B's own patient retries; None: it does.

    W&B has certificates of its own, and tells itself what is wrong with one.
    """
    reason = answer(wandb_url(), _PROBE_SECONDS)
    return f"{wandb_url()}: {reason}" if reason and "CERTIFICATE" not in reason else None


def _new_id(sweep: str | None) -> str | None:
    """Id of a run that begins: WANDB_RUN_ID, of a queue's script or an agent, would make one run of a sweep's jobs."""
    return secrets.token_hex(6) if sweep else os.environ.get("WANDB_RUN_ID")


def log_facts(loggers: Sequence[Logger], facts: Mapping[str, float | int | str]) -> None:
    """Add plain scalars known only after the start (parameters, errors of the fit) to the W&B config.

    Dashboards group and sort by them there.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(dict(facts), allow_val_change=True)


def finish_loggers(
    loggers: Sequence[Logger], record: RunRecord, exit_code: int, metrics: Mapping[str, float] | None = None
) -> None:
    """End the W&B run with the process's true exit code, so that the next job of a sweep starts its own.

    A failure of W&B is only a warning in ``record``, since the run itself has ended by now.

    Args:
        exit_code: 0, or what the process will exit with: W&B shows anything else as failed.
        metrics: final results for the W&B summary.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with record.tolerating("W&B summary"):
                logger.experiment.summary.update(dict(metrics or {}))
            with record.tolerating("W&B"):
                logger.experiment.finish(exit_code=exit_code)
