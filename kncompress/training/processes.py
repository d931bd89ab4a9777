"""How many processes a run has, on which devices, and that they all end."""

import contextlib
import os
import subprocess
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment

from kncompress.config import TrainerConfig
from kncompress.errors import UserError
from kncompress.runs.process import checked_for

_SECONDS_TO_END = 60


def started_outside() -> tuple[str, int] | None:
    """Launcher and number of all processes where torchrun or SLURM has started this one among others."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect() and SLURMEnvironment.job_id() is not None:
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    return None


def accelerator(asked: str, single: bool = True) -> str:
    """``gpu`` or ``cpu``; ``auto`` (an accelerator of another kind) only for a ``single`` process."""
    if asked == "auto" and torch.cuda.is_available():
        return "gpu"
    return "cpu" if asked == "auto" and not single else asked


def accelerator_of(config: TrainerConfig) -> str:
    """That of a training run."""
    return accelerator(config.accelerator, config.strategy == "auto" and config.devices == 1 and config.nodes == 1)


def devices(config: TrainerConfig) -> int:
    """Processes on each node.

    Raises:
        UserError: GPUs that are not there, or other processes than torchrun or SLURM has started.
    """
    outside = started_outside()
    gpus = torch.cuda.device_count() if accelerator_of(config) == "gpu" else 0
    automatic = outside[1] // config.nodes if outside else gpus or 1
    count = automatic if config.devices == "auto" else config.devices
    if outside and count * config.nodes != outside[1]:
        raise UserError(
            f"trainer.devices={config.devices}: {outside[0]} has started {outside[1]} processes, but devices x nodes "
            f"are {count} x {config.nodes}; set trainer.devices (on each node) and trainer.nodes to what it starts"
        )
    if accelerator_of(config) == "gpu" and count > gpus:
        raise UserError(f"trainer.devices={config.devices}: there are {gpus} GPUs here; trainer=cpu needs none")
    return count


def processes(config: TrainerConfig) -> int:
    """Processes over all nodes. Raises UserError for what cannot run here, or where ``checked_for`` tells."""
    elsewhere = checked_for()
    if elsewhere and (config.nodes == 1 or elsewhere == "SLURM"):
        return config.nodes * (1 if config.devices == "auto" else config.devices)
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: there is no GPU here; trainer=cpu needs none")
    if config.nodes > 1 and started_outside() is None:
        raise UserError(f"trainer.nodes={config.nodes}: several machines are started by torchrun or SLURM (srun)")
    return devices(config) * config.nodes


def connect_again(backend: str) -> None:
    """Connect the processes of one machine that torchrun has started again (``--max-restarts``); else nothing is done.

    torchrun keeps its store, and in it the addresses of the processes that are gone, where the new ones would look for
    each other (github.com/pytorch/pytorch/issues/167288). So each start gets a place of its own in it. On several
    machines torchrun counts the starts of each by itself, and there has to be told to make a new store.
    """
    start, kept = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if start == "0" or kept != "True" or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return
    if dist.is_initialized():  # a validation after the training sets up again
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    dist.init_process_group(backend, store=dist.PrefixStore(f"start-{start}", store), rank=rank, world_size=world)


def end_children(trainer: L.Trainer, failed: bool) -> None:
    """Wait for the processes that ``trainer`` has started on this node, or end them after a failure.

    Lightning's observer kills this process, and with it a whole sweep, as soon as it sees one of them with an
    exit code; it looks at the launcher's list, which is emptied here.
    """
    started: list[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
    children = list(started)
    started.clear()
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2 if failed else _SECONDS_TO_END)
        if child.poll() is None:
            child.kill()
            child.wait()
