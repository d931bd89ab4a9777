"""Launchers that start the jobs of a sweep on other machines: what they must know, and what is not checked here."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from kncompress.errors import UserError


def launcher_elsewhere(composed: DictConfig) -> str | None:
    """``SLURM``, or ``Ray`` where it is a cluster that runs already; None for a launcher of this machine."""
    launcher = composed.hydra.launcher
    name = str(launcher._target_).rpartition(".")[2]
    if name == "RayLauncher" and launcher.ray.init.get("address") is not None:
        return "Ray"
    return "SLURM" if name == "SlurmLauncher" else None


def check_tasks(composed: DictConfig, configs: Sequence[Any]) -> None:
    """Raises UserError where SLURM cannot know how many tasks a job has: all jobs are one array, with as many each."""
    trainers = [config.trainer for config in configs if hasattr(config, "trainer")]
    if launcher_elsewhere(composed) != "SLURM" or not trainers:
        return
    if "auto" in [trainer.devices for trainer in trainers]:
        raise UserError("trainer.devices=auto: SLURM starts a task for each device; give their number on a node")
    for key in ("devices", "nodes"):
        found = list(dict.fromkeys(str(getattr(trainer, key)) for trainer in trainers))
        if len(found) > 1:
            raise UserError(
                f"trainer.{key}={','.join(found)}: the jobs of a sweep are one array of SLURM, of as many tasks each; "
                "make a sweep for each value"
            )
