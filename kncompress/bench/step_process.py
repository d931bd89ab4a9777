"""Our side of part ``step``, a process of its own: training by ``ILKDPretraining`` as ``train`` runs it.

Usage: python -m kncompress.bench.step_process JOB.json RESULT.json
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from kncompress.bench.child import exchange, peak_memory
from kncompress.bench.step_job import OBJECTIVE, WARM_UP, StepJob
from kncompress.bench.timing import synchronize
from kncompress.config import OptimizerConfig, TrainerConfig
from kncompress.training.batches import BatchPlan
from kncompress.training.pretraining import ILKDPretraining
from kncompress.training.trainer import build_trainer, keep_freed_memory, quiet_lightning


class StepClock(Checkpoint):
    """When each step ended, and how long it waited for its data. As a ``Checkpoint`` it keeps Lightning from saving."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.ends:
            self.waits.append(time.perf_counter() - self.ends[-1])

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        synchronize(trainer.strategy.root_device)
        self.losses.append(float(outputs["loss"]))
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each timed step, from the end of the one before."""
        timed = self.ends[WARM_UP - 1 :]
        return [end - start for start, end in pairwise(timed)]


def main(job: StepJob) -> dict[str, Any]:
    """Seconds of the timed steps, seconds that they waited for data, the first loss, and the peak of memory."""
    quiet_lightning()
    keep_freed_memory()
    teacher, student = job.models()
    clock = StepClock()
    accelerator = "gpu" if job.device == "cuda" else "cpu"
    config = TrainerConfig(accelerator=accelerator, precision=job.precision, validate_every=job.all_steps)
    batches = BatchPlan(job.sequence, job.batch, job.batch, 1, job.all_steps)
    module = ILKDPretraining(student, teacher, OBJECTIVE, OptimizerConfig(lr=job.lr), job.all_steps)
    with tempfile.TemporaryDirectory(prefix="kncompress-bench-") as folder:
        loader = DataLoader(job.blocks(Path(folder)), batch_size=job.batch)
        trainer = build_trainer(config, batches, Path(folder), [clock], [], TorchCheckpointIO())
        trainer.fit(module, loader)
    return {
        "seconds": clock.seconds,
        "waits": clock.waits[WARM_UP - 1 :],
        "loss": clock.losses[0],
        "peak": peak_memory(torch.device(job.device)),
    }


if __name__ == "__main__":
    values, made = exchange(sys.argv[1:])
    made.write_text(json.dumps(main(StepJob(**values))))
