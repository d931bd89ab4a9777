"""Training by the clock: rate, validations and end follow the time, also over a stop."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from kncompress.config import OptimizerConfig, TrainerConfig
from kncompress.errors import UserError
from kncompress.training.checkpoints import LastCheckpoint, WholeFileCheckpointIO
from kncompress.training.clock import TICKS, TrainingClock
from kncompress.training.optimization import build_schedule


class Endless(IterableDataset[Any]):
    """Batches without end."""

    def __iter__(self) -> Any:
        while True:
            yield torch.ones(1, 2)


class Watched(LightningModule):
    """Notes the rate of every step and when it validates; each step takes ``seconds`` of a clock of its own."""

    def __init__(self, clock: TrainingClock, seconds: list[float], now: list[float]) -> None:
        super().__init__()
        self.layer, self.clock, self.seconds, self.now = nn.Linear(2, 1), clock, seconds, now
        self.rates: list[float] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, index: int) -> Any:
        if index % 2 == 1:  # two micro-batches a step
            self.now[0] += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def on_validation_end(self) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = build_schedule(optimizer, TICKS, OptimizerConfig(warmup=0.1, final=0.0), lambda: self.clock.tick)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(tmp_path: Any, seconds: list[float], most: int = -1, resume: bool = False) -> tuple[Watched, TrainingClock]:
    now = [100.0]
    clock = TrainingClock(1.0, now=lambda: now[0])
    module, last = Watched(clock, list(seconds), now), LastCheckpoint(tmp_path)
    trainer = Trainer(
        accelerator="cpu", max_steps=most, max_epochs=-1, accumulate_grad_batches=2, callbacks=[clock, last],
        val_check_interval=TrainingClock.NO_INTERVAL, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, plugins=[WholeFileCheckpointIO()],
        limit_val_batches=1,
    )  # fmt: skip
    loaders = DataLoader(Endless(), batch_size=None), DataLoader(Endless(), batch_size=None)
    trainer.fit(module, *loaders, ckpt_path=tmp_path / "last.ckpt" if resume else None, weights_only=True)
    return module, clock


def test_the_schedule_ends_when_the_time_does(tmp_path: Any) -> None:
    module, clock = train(tmp_path, [0.25] * 120 + [0.5])  # 60 s: 120 steps of 0.25 s, 60 of 0.5 s
    assert len(module.rates) == 180 and clock.share == 1.0
    assert max(module.rates) == pytest.approx(1.0, abs=0.02) and module.rates[-1] < 0.01
    rising, falling = module.rates[:20], module.rates[26:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert module.rates[120] == pytest.approx(0.5 * (1 + math.cos(math.pi * (0.5 - 0.1) / 0.9)), abs=0.02)
    assert len(module.validated) == 10 and module.validated[-1] == 180


def test_the_first_of_few_steps_are_small(tmp_path: Any) -> None:
    module, _ = train(tmp_path, [6.0])
    assert len(module.rates) == 10 and max(module.rates) > 0.1
    assert all(rate <= (step + 1) / 20 for step, rate in enumerate(module.rates))


def test_a_stopped_run_goes_on_with_what_is_left(tmp_path: Any) -> None:
    module, clock = train(tmp_path, [2.0], most=12)
    assert clock.seconds == 24.0 and module.validated == [3, 6, 9, 12]
    module, clock = train(tmp_path, [4.0], resume=True)
    assert len(module.rates) == 9 and clock.seconds == 60.0 and clock.left == 0
    assert module.validated[-1] == 21
    module, _ = train(tmp_path, [4.0], resume=True)  # the time is used
    assert module.rates == []


def test_time_beside_steps_is_refused() -> None:
    with pytest.raises(UserError, match="minutes=30: the time decides how far it comes; not with trainer"):
        TrainerConfig(minutes=30, steps=7)
    with pytest.raises(UserError, match="minutes=0: must be greater than 0"):
        TrainerConfig(minutes=0)
