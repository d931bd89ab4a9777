"""What a checkpoint needs beside weights, optimiser and sampler to resume exactly: random states, the W&B run."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

_NUMPY_KEYS = 624
_ACCUMULATE = "accumulate"


class RunState(Callback):
    """Keeps the random states of every process and the W&B id in the checkpoint.

    A new run gives each process random numbers of its own, which dropout needs; a resumed one takes them up where
    the checkpoint was saved, and a process that was not there begins with its own. All processes must save together.
    """

    def __init__(self, seed: int, wandb_id: str | None = None) -> None:
        self.seed, self.wandb_id = seed, wandb_id
        self._trainer: Trainer | None = None
        self._restored: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, whose processes the state is gathered from."""
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the random states: after this nothing is drawn but what training draws."""
        if self._restored is not None and trainer.global_rank < len(self._restored):
            restore_random_state(self._restored[trainer.global_rank])
        elif trainer.global_rank:
            torch.manual_seed(self.seed + trainer.global_rank)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how many micro-batches make a step."""
        checkpoint[_ACCUMULATE] = trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recount them, where another number of processes makes others."""
        now = trainer.accumulate_grad_batches
        recount(checkpoint["loops"], checkpoint.get(_ACCUMULATE, now), now)

    def state_dict(self) -> dict[str, Any]:
        """Random states, one row a process, and the W&B id."""
        state = random_state()
        rows = [state]
        if self._trainer is not None and self._trainer.world_size > 1:
            state = state.to(self._trainer.strategy.root_device)
            rows = [torch.empty_like(state) for _ in range(self._trainer.world_size)]
            torch.distributed.all_gather(rows, state)
        return {"random": torch.stack(rows).cpu(), "wandb_id": self.wandb_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the random states; they are set when training starts."""
        self._restored = state_dict["random"]


def recount(loops: dict[str, Any], before: int, now: int) -> None:
    """Set the micro-batches that Lightning has counted to what they would be with ``now`` of them in a step instead of
    ``before``, in place: by their number it knows where steps and validations end.

    Args:
        loops: of a checkpoint that was saved between two steps.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        counts.update({name: ready * now // before - (ready - value) for name, value in counts.items()})


def random_state() -> Tensor:
    """State of the generators of torch (CPU, and CUDA where it is in use), numpy and Python, as one (n,) uint8 tensor.

    Plain numbers in a tensor are read back without unpickling anything.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python, python_gauss = random.getstate()
    parts = [
        torch.get_rng_state().numpy().tobytes(),
        np.asarray(keys, dtype=np.uint32).tobytes(),
        np.asarray([position, has_gauss], dtype=np.int64).tobytes(),
        np.asarray([gauss, np.nan if python_gauss is None else python_gauss], dtype=np.float64).tobytes(),
        np.asarray(python, dtype=np.uint32).tobytes(),
        torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b"",
    ]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).clone()


def restore_random_state(state: Tensor) -> None:
    """Set the generators to what ``random_state`` has told."""
    content = state.cpu().numpy().tobytes()
    sizes = [torch.get_rng_state().numel(), 4 * _NUMPY_KEYS, 16, 16, 4 * len(random.getstate()[1])]
    parts = []
    for size in sizes:
        parts.append(content[:size])
        content = content[size:]
    torch.set_rng_state(torch.frombuffer(bytearray(parts[0]), dtype=torch.uint8))
    keys, (position, has_gauss) = np.frombuffer(parts[1], np.uint32), np.frombuffer(parts[2], np.int64)
    gauss, python_gauss = np.frombuffer(parts[3], np.float64)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), float(gauss)))
    python = tuple(int(value) for value in np.frombuffer(parts[4], np.uint32))
    random.setstate((random.getstate()[0], python, None if np.isnan(python_gauss) else float(python_gauss)))
    if content and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(content), dtype=torch.uint8))
