"""A small real verb to test the dispatcher: it keeps a run record and does what ``logger.project`` says."""

import errno
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from kncompress.__main__ import VERBS, main
from kncompress.cli.verbs import Verb
from kncompress.config import TrainConfig
from kncompress.errors import UserError
from kncompress.runs.record import RunRecord

VERB = Verb("train", TrainConfig, "probe_verb", "Probe the dispatcher.")


def check(config: TrainConfig) -> None:
    if config.seed == 13:
        raise UserError("seed=13: refused by check")


def run(config: TrainConfig, run_dir: Path) -> dict | None:
    if config.logger.project == "fabric":
        return _all_reduce(config, run_dir)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        right = config.factors.mlp.right if config.factors.mlp else None
        words = [config.trainer.steps, right, config.run_dir, Path.cwd()]
        (run_dir / "child.txt").write_text("\n".join(map(str, words)))
        return None
    if config.logger.project == "early":
        raise UserError("data.source=gone: no such text")
    resume = config.resume is not None
    with RunRecord.open(run_dir, "train", asdict(config), config.seed, resume=resume) as record:
        match config.logger.project:
            case "fail":
                raise RuntimeError("the loss is not finite")
            case "user":
                raise UserError("trainer.steps=3: too few")
            case "wait" if not resume:
                (run_dir / "waiting").touch()
                try:
                    time.sleep(86400)
                finally:
                    (run_dir / "cleaned").touch()
            case "flaky" if not resume:
                raise RuntimeError("no space left on device")
            case "disk" if not resume:
                try:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    raise RuntimeError("unexpected pos 64 vs 0") from error  # as torch says it
            case "swallow":  # as a training loop that stops at the next step
                (run_dir / "waiting").touch()
                try:
                    time.sleep(86400)
                except SystemExit:
                    (run_dir / "cleaned").touch()
            case "stumble":
                (run_dir / "waiting").touch()
                try:
                    time.sleep(86400)
                except SystemExit as stop:
                    raise RuntimeError("no room for the checkpoint") from stop
            case "log":
                logger = logging.getLogger("lightning.pytorch")
                logger.info("one line")
            case "ddp":
                os.environ["MASTER_PORT"] = "12345"
                _start_child()
        metrics = {"perplexity": 10.0 + config.seed, "steps": config.trainer.steps or 0}
        if config.factors.mlp is not None:  # two that pull apart, as in a search
            metrics |= {"parameters/student": 100 * config.factors.mlp.terms}
            metrics |= {"perplexity/student": 20.0 / config.factors.mlp.terms + config.seed}
        record.finish("finished", metrics)
    if config.logger.project == "late":
        raise RuntimeError("the process group is gone")
    return None


def _start_child() -> None:
    """Start a second process by sys.argv and with the words that Lightning adds for Hydra."""
    from hydra.core.hydra_config import HydraConfig

    command = [sys.executable, *sys.argv, f'hydra.run.dir="{HydraConfig.get().run.dir}"']
    command += ["hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    subprocess.run(command, env={**os.environ, "LOCAL_RANK": "1", "NODE_RANK": "0"}, check=True)


def _all_reduce(config: TrainConfig, run_dir: Path) -> dict:
    """Lightning's own launcher with gloo: every process adds its rank + 1 and tells its folder."""
    import torch
    from lightning.fabric import Fabric

    strategy = "ddp" if config.trainer.devices > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=config.trainer.devices, strategy=strategy)
    fabric.launch()
    (run_dir / f"rank{fabric.global_rank}").touch()
    return {"total": float(fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum"))}


if __name__ == "__main__":
    # Lightning's own handler, as it is added where Lightning is imported before Hydra sets up logging.
    logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler())
    logging.getLogger("lightning.pytorch").propagate = False
    VERBS["train"] = VERB
    sys.exit(main())
