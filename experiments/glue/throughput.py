"""Examples per second of plain fine-tuning, here and by transformers' Trainer: same model, batches, optimiser steps.

Both train the mini teacher on RTE, from the same start, in the same batches of like lengths, by AdamW with clipping, in
float32. Runs alternate, so that a busy machine slows both; the median of three counts.

Usage: KNCOMPRESS_DATA=<folder with glue/> python experiments/glue/throughput.py FILE [steps]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from kncompress.config import (
    FineTuningConfig,
    GlueConfig,
    GlueDataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from kncompress.glue.classifiers import load_classifier, task_data
from kncompress.glue.finetuning import TaskData, fine_tune
from kncompress.glue.readers import find_source
from kncompress.glue.sequences import training_loader
from kncompress.glue.tasks import TASKS
from kncompress.training.student import locate, tokenizer_of
from kncompress.training.trainer import keep_freed_memory, quiet_lightning

SIZE = 32


class SameBatches(Trainer):
    """Trainer with the batches of this package."""

    data: TaskData

    def get_train_dataloader(self):
        return training_loader(self.data.train, SIZE, self.data.padding, 0)


def model_of(data: TaskData) -> torch.nn.Module:
    """The mini teacher with a head for RTE."""
    torch.manual_seed(0)
    return load_classifier(locate("asset:mini"), data.task, data.padding)


def here(data: TaskData) -> float:
    """Examples per second of one epoch by this package; scoring is not counted."""
    settings = FineTuningConfig(epochs=1, batch_size=SIZE, accelerator="cpu", precision="fp32")
    rates = OptimizerConfig(lr=1e-4)
    return fine_tune(model_of(data), None, data, ObjectiveConfig(), rates, settings, 0).examples_per_second


def by_trainer(data: TaskData) -> float:
    """Examples per second of one epoch by transformers' Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=SIZE, learning_rate=1e-4, max_grad_norm=1.0,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = SameBatches(model_of(data), arguments, train_dataset=data.train)
        trainer.data = data
        began = time.perf_counter()
        trainer.train()
        return len(data.train) / (time.perf_counter() - began)


def main(file: Path, examples: int) -> None:
    """Write and print the medians."""
    quiet_lightning()
    keep_freed_memory()
    config = GlueConfig(
        model=ModelConfig(path="asset:mini"),
        data=GlueDataConfig(source=f"{os.environ['KNCOMPRESS_DATA']}/glue", train_examples=examples),
    )
    data, _ = task_data(config, find_source(config.data.source), TASKS["rte"], tokenizer_of(config.model))
    found: dict[str, list[float]] = {"here": [], "trainer": []}
    for _ in range(3):
        found["here"].append(here(data))
        found["trainer"].append(by_trainer(data))
    medians = {name: statistics.median(values) for name, values in found.items()}
    file.write_text(json.dumps({"examples_per_second": medians, "runs": found}, indent=2) + "\n")
    print(f"examples per second: {medians['here']:.1f} here, {medians['trainer']:.1f} by transformers' Trainer")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 640)
