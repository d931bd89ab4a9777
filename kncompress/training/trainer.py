"""The Lightning trainer that a configuration asks for."""

import ctypes
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import Strategy

from kncompress.config import TrainerConfig
from kncompress.training.batches import BatchPlan
from kncompress.training.clock import TrainingClock
from kncompress.training.processes import accelerator_of, devices, started_outside
from kncompress.training.ranks import WatchedDDP
from kncompress.training.sharded_strategy import ShardedStrategy

_VALIDATIONS, _LOG_EVERY = 10, 10
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def build_trainer(
    config: TrainerConfig,
    batches: BatchPlan,
    folder: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    checkpoint_io: CheckpointIO,
) -> L.Trainer:
    """A trainer that takes ``batches.steps`` optimiser steps and validates about ten times; where there is no number of
    steps, a ``TrainingClock`` among the ``callbacks`` does both.
    """
    steps = batches.steps
    every = TrainingClock.NO_INTERVAL
    if steps is not None:
        every = (config.validate_every or max(1, steps // _VALIDATIONS)) * batches.accumulate
    plugins: list[Any] = [checkpoint_io]
    outside = started_outside()
    if outside and outside[0] == "SLURM":
        # Lightning would requeue the job and save a checkpoint of its own; a run is resumed by resume=auto.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return L.Trainer(
        accelerator=accelerator_of(config),
        strategy=_strategy(config),
        devices=devices(config),
        num_nodes=config.nodes,
        precision=precision(config.precision, config.accelerator),
        max_steps=-1 if steps is None else steps,
        max_epochs=-1,
        accumulate_grad_batches=batches.accumulate,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        gradient_clip_val=config.gradient_clip or None,
        num_sanity_val_steps=0,
        log_every_n_steps=_LOG_EVERY if steps is None else max(1, min(_LOG_EVERY, steps // 20)),
        callbacks=list(callbacks),
        logger=list(loggers),
        plugins=plugins,
        default_root_dir=folder,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=config.strategy != "fsdp",  # what is gathered in that mode cannot be trained afterwards
    )


def _strategy(config: TrainerConfig) -> str | Strategy:
    count = devices(config) * config.nodes
    if config.strategy == "fsdp":
        return ShardedStrategy(count)
    if config.strategy == "ddp" or count > 1:
        return WatchedDDP(gradient_as_bucket_view=True)
    return "auto"


def quiet_lightning() -> None:
    """Leaves out Lightning's lines about hardware, precision and products, and warnings that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The loader reads a memory map: workers would only copy.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # The frozen teacher is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
    # Factors of one term: a dimension of size 1 has any stride.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # The text's sampler goes on where the checkpoint stopped.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
    # Lightning's own use of a torch function that newer torch deprecates.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")


def keep_freed_memory() -> None:
    """Has glibc keep what it frees instead of handing it back to the system.

    Activations of a training step are large blocks that are freed and asked for again at every step; by default each
    is mapped anew and its pages are cleared, which took a third of the time of a step on two cores. Elsewhere than on
    Linux with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def precision(asked: str, accelerator: str) -> Any:
    """Lightning's name of a precision."""
    return "bf16-mixed" if takes_bf16(asked, accelerator) else "32-true"


def takes_bf16(asked: str, accelerator: str) -> bool:
    """Whether a precision is bf16; ``auto`` is where the hardware multiplies bf16 natively."""
    return _multiplies_bf16(accelerator) if asked == "auto" else asked == "bf16"


def slow_bf16(config: TrainerConfig) -> str | None:
    """A warning where bfloat16 is asked of a CPU without an instruction for it: a hundred times slower than float32."""
    asked = [f"trainer.{name}=bf16" for name in ("precision", "teacher") if getattr(config, name) == "bf16"]
    capabilities = _capabilities()
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    if not asked or on_gpu or not capabilities or any("bf16" in name and capabilities[name] for name in capabilities):
        return None
    return f"{asked[0]}: this CPU has no instructions for bfloat16, and is a hundred times slower with it; leave it out"


def _capabilities() -> dict[str, Any]:
    """Of the CPU; empty with a torch that does not tell them."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def _multiplies_bf16(accelerator: str) -> bool:
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX-512 alone has bf16 dot products, but no gain over float32 was measured without the tile unit.
    capabilities = _capabilities()
    return bool(capabilities.get("amx_bf16", False))
