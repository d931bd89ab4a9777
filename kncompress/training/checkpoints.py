"""Checkpoints of a run: ``last.ckpt`` and ``best.ckpt``, written whole, read without unpickling."""

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor

from kncompress.errors import UserError
from kncompress.runs.whole_file import replacing
from kncompress.terminal import first_line

_PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step")
LAST = "last.ckpt"
BEST = "best.ckpt"


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Saves by a rename and loads with ``weights_only=True``; a plugin for the Trainer.

    Lightning's own writes to the system's temporary folder and moves the file over, which is a copy that can
    break off where that is another file system; and it holds the whole file in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save ``checkpoint`` to ``path``: there whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        """Load tensors and plain values; anything else in the file is an error, whatever the caller asks.

        Raises UserError where the file is cut short or otherwise damaged.
        """
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, place: Any = "cpu", mapped: bool = False) -> dict[str, Any]:
    """The tensors and plain values of a checkpoint, which stay in the file until they are used where ``mapped``.

    Raises UserError where the file is damaged.
    """
    with _named(path):
        facts = path.stat()
        _check_sums(path, facts.st_size, facts.st_mtime_ns)
        values = torch.load(path, map_location=place, weights_only=True, mmap=mapped or None)
        missing = [name for name in _PARTS if not isinstance(values, dict) or name not in values]
        if missing:
            raise ValueError(f"has no {missing[0]}")
        return cast(dict[str, Any], values)


def check_checkpoint(path: Path) -> None:
    """Raises UserError where ``path`` exists and cannot be read, or is not as it was written."""
    if path.exists():
        read_checkpoint(path, "meta")


@lru_cache(maxsize=8)
def _check_sums(path: Path, size: int, modified: int) -> None:
    """Raises ValueError where a part of the zip archive, as which torch writes, has not the CRC-32 that it says.

    Once a process for each state of the file: torch writes these sums and does not look at them when it reads.
    """
    try:
        with ZipFile(path) as archive:
            wrong = archive.testzip()
    except (BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(first_line(error)) from error
    if wrong is not None:
        raise ValueError(f"{wrong} is not as it was written")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = first_line(error)
        if isinstance(error, UnpicklingError):
            reason = "not tensors and plain values alone"
        raise UserError(
            f"resume={path.parent.parent}: {path.parent.name}/{path.name} is damaged ({reason}); delete it to begin "
            "this run again, or start a new run"
        ) from error


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, the weights with the lowest finite ``validation/loss``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            monitor="validation/loss",
            save_top_k=1,
            auto_insert_metric_name=False,  # a "=" in the name breaks command line overrides
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Accept a folder with checkpoints in it: that of a resumed run."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current`` is the best so far; what is not finite never is."""
        return current is not None and math.isfinite(current) and super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score, also where the run folder has been moved since."""
        here = Path(str(self.dirpath)) / BEST
        state = state_dict | {"dirpath": self.dirpath}
        if state["best_model_path"] and here.is_file():
            state |= {"best_model_path": str(here), "kth_best_model_path": str(here)}
            state["best_k_models"] = {str(here): state["best_model_score"]}
        super().load_state_dict(state)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run resumes: after validations, and every so many steps.

    ``ModelCheckpoint(save_last=True)`` renews it only when the monitored value has improved.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        """Args: ``every``: optimiser steps between two saves besides those after validations; None: no others."""
        self.path = folder / LAST
        self.every = every
        self._saved_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has been resumed from need not be saved again."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where ``every`` steps have passed. Where a validation is due, save only after it: a run that resumes
        would otherwise skip that validation.
        """
        if self.every is not None and trainer.global_step % self.every == 0 and not self.validation_is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, so that its result is in the checkpoint."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._saved_step = None
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step has been saved; call it between two steps, on every rank."""
        if self._saved_step != trainer.global_step:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=False)

    @staticmethod
    def validation_is_due(trainer: Trainer) -> bool:
        """Whether a validation follows the optimiser step that has just ended."""
        interval = trainer.val_check_batch  # what the interval has become, and what a clock sets
        every = interval // trainer.accumulate_grad_batches if isinstance(interval, int) else 0
        return every > 0 and trainer.global_step % every == 0 and trainer.enable_validation


def checkpoint_callbacks(folder: Path, every: int | None = None) -> tuple[BestCheckpoint, LastCheckpoint]:
    """Return the callbacks that keep ``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt`` in a run folder.

    Best comes first, so that the last checkpoint knows about it. Give the Trainer
    :class:`WholeFileCheckpointIO` as a plugin, and ``ckpt_path=folder / "checkpoints" / LAST`` to resume.
    """
    return BestCheckpoint(folder / "checkpoints"), LastCheckpoint(folder / "checkpoints", every)
