"""A real but tiny training: a 4 x 4 linear map fitted by Lightning on the CPU in milliseconds."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class LinearTask(LightningModule):
    """Logs what the tasks log; ``poison`` maps an optimiser step (from 0) to "loss" or "gradient"."""

    def __init__(self, poison: dict[int, str] | None = None, validation: list[float] | None = None) -> None:
        super().__init__()
        self.map = torch.nn.Linear(4, 4)
        torch.nn.init.ones_(self.map.weight)
        torch.nn.init.zeros_(self.map.bias)
        self.poison = poison or {}
        self.validation = list(validation or [])
        self.validated_at: list[int] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.map(batch[0]).square().mean()
        kind = self.poison.get(self.global_step)
        if kind == "loss":
            loss = loss * float("nan")
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        self.log("train/loss", loss)
        self.log("train/tokens_per_second", 1234.4)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        value = self.validation.pop(0) if self.validation else float(self.map.weight.detach().square().mean())
        self.validated_at.append(self.global_step)
        self.log("validation/loss", value)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@pytest.fixture
def linear_task() -> type[LinearTask]:
    return LinearTask


@pytest.fixture
def fit() -> Callable[..., Trainer]:
    """``fit(task, steps, validate_every=None, ckpt_path=None, **trainer options)`` -> the trainer."""

    def run(
        task: LightningModule,
        steps: int,
        validate_every: int | None = None,
        ckpt_path: Any = None,
        batches: int = 100,
        **options: Any,
    ) -> Trainer:
        data = TensorDataset(torch.ones(batches, 4))  # equal batches: a resume cannot hide behind their order
        options = {"logger": False, "callbacks": [], "enable_progress_bar": False} | options
        if not any("Checkpoint" in type(callback).__name__ for callback in options["callbacks"]):
            options["enable_checkpointing"] = False
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=validate_every,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if validate_every else 0,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            log_every_n_steps=1,
            **options,
        )
        validation = DataLoader(TensorDataset(torch.ones(1, 4))) if validate_every else None
        with warnings.catch_warnings():
            # Both are meant here: steps without validation, and equal batches that need no resumable loader.
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
            trainer.fit(task, DataLoader(data), validation, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
